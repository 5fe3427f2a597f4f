-- The rows of the columns that changed after a certain change, and the marks, at one moment. Writes nothing.
--
-- KEYS: state:epoch, state:run_id, columns:changed, accounts, mark:version, then per symbol: mark_price, mark, then the
--       columns
-- ARGV: signature, number of the last change known ('' for none), changes read at most, number of symbols
-- Answers ok, how many accounts there are, the numbers of the newest change and of the last one read, epoch, time, version
-- of the marks, per symbol price, price accepted and its time, the slots read, packed, and their values per column, packed.
-- Or behind and the number of the newest change ('' for none), when only a read of every row will do.
local refused, epoch = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local symbols, columns = tonumber(ARGV[4]), {}
for i = 6 + 2 * symbols, #KEYS do columns[#columns + 1] = KEYS[i] end
local bad = short_of(KEYS[4], columns)
if bad then return bad end
local bytes
bytes, bad = changes_noted(KEYS[3])
if bad then return bad end
if bytes == 0 or bytes % 8 ~= 0 then return {'behind', ''} end
local before = struct.unpack('<i8', redis.call('GETRANGE', KEYS[3], 0, 7))
local known, newest = integer_of(ARGV[2]), before + bytes / 8 - 1
if not known or known < before or known > newest then return {'behind', string.format('%d', newest)} end
local version
version, bad = read('GET', KEYS[5])
if bad then return bad end
local marks = {}
for i = 6, 4 + 2 * symbols, 2 do
  local mark
  mark, bad = read('HMGET', KEYS[i + 1], 'price', 'timestamp')
  if bad then return bad end
  marks[#marks + 1] = {not wrong_type(KEYS[i], 'string') and redis.call('GET', KEYS[i]), mark[1], mark[2]}
end

-- Each slot once.
local accounts = redis.call('LLEN', KEYS[4])
local last = math.min(newest, known + tonumber(ARGV[3]))
local first_byte, last_byte = (known - before) * 8 + 8, (last - before) * 8 + 7
local noted = ''
if last > known then noted = redis.call('GETRANGE', KEYS[3], first_byte, last_byte) end
local seen, slots, firsts, lasts = {}, {}, {}, {}
for i = 1, #noted, 8 do
  local packed = string.sub(noted, i, i + 7)
  if not seen[packed] then
    local slot = struct.unpack('<i8', packed)
    if slot < 0 or slot >= accounts then return {'behind', string.format('%d', newest)} end
    seen[packed] = true
    slots[#slots + 1] = packed
    -- As text, once and not for each column: to make a text of a number takes Lua as long as Redis takes to read.
    firsts[#slots], lasts[#slots] = string.format('%d', slot * 8), string.format('%d', slot * 8 + 7)
  end
end
local answer = {'ok', accounts, newest, last, epoch, redis.call('TIME'), version, marks, table.concat(slots)}
for _, key in ipairs(columns) do
  local values = {}
  for i = 1, #slots do values[i] = redis.call('GETRANGE', key, firsts[i], lasts[i]) end
  answer[#answer + 1] = table.concat(values)
end
return answer
