-- What the columns have to hold of some accounts, from their ledgers. Writes nothing.
--
-- KEYS: state:epoch, state:run_id, then account ledgers
-- ARGV: signature, then per symbol: the ledger's field of its position
-- Answers ok, the numbers (from 1) of the accounts whose ledger holds no row, then packed, the accounts one after the
-- other: balances, breaches, and per symbol quantities and costs.
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local nothing = '\0\0\0\0\0\0\0\0'
local unknown, columns = {}, {{}, {}}
for i = 2, #ARGV do
  columns[2 * i - 1] = {}
  columns[2 * i] = {}
end
for account = 1, #KEYS - 2 do
  local row = {}
  if not wrong_type(KEYS[account + 2], 'hash') then
    row = redis.call('HMGET', KEYS[account + 2], 'balance', 'breach', unpack(ARGV, 2))
  end
  if not row[1] then unknown[#unknown + 1] = account end
  local breach = row[2] and integer_of(row[2])
  columns[1][account] = row[1] or nothing
  columns[2][account] = breach and struct.pack('<i8', breach) or nothing
  for i = 2, #ARGV do
    local position = row[i + 1] or (nothing .. nothing)
    columns[2 * i - 1][account] = string.sub(position, 1, 8)
    columns[2 * i][account] = string.sub(position, 9, 16)
  end
end
local answer = {'ok', unknown}
for _, column in ipairs(columns) do answer[#answer + 1] = table.concat(column) end
return answer
