-- Bring the equity and used_margin keys up to date, where the account's row is still the one they were computed from.
--
-- KEYS: state:epoch, state:run_id, columns:balance, then the quantity and cost columns of each symbol (in all
--       ARGV[2] columns), then per account: equity, used_margin
-- ARGV: signature, number of columns, then per account: slot, row (8 bytes a column), equity, used_margin
-- Answers ok and how many keys changed.
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local columns = tonumber(ARGV[2])
for i = 3, columns + 2 do
  local bad = wrong_type(KEYS[i], 'string')
  if bad then return bad end
end
local changed = 0
local function put(key, text)
  if wrong_type(key, 'string') or redis.call('GET', key) ~= text then
    redis.call('SET', key, text)
    changed = changed + 1
  end
end
local key = columns + 3
for i = 3, #ARGV, 4 do
  local offset = tonumber(ARGV[i]) * 8
  local row = {}
  for column = 1, columns do
    local value = redis.call('GETRANGE', KEYS[column + 2], offset, offset + 7)
    row[column] = value == '' and '\0\0\0\0\0\0\0\0' or value
  end
  if table.concat(row) == ARGV[i + 1] then
    put(KEYS[key], ARGV[i + 2])
    put(KEYS[key + 1], ARGV[i + 3])
  end
  key = key + 2
end
return {'ok', changed}
