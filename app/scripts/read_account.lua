-- One account as it stands, the operation that may have been booked already, and the marks. Writes nothing.
--
-- KEYS: state:epoch, state:run_id, operation, account balance, positions, account ledger, mark:version, state:halted,
--       columns:balance, columns:breach, then per symbol: mark_price, mark, columns quantity, columns cost
-- ARGV: signature, then per symbol: the ledger's field of its position
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused and refused[1] ~= 'state_unreconciled' then return refused end

local kinds = {'string', 'string', 'hash', 'hash', 'string', 'string', 'string', 'string'}
for i = 1, 8 do
  local bad = wrong_type(KEYS[i + 2], kinds[i])
  if bad then return bad end
end

local known = redis.call('GET', KEYS[3]) or ''
if known ~= '' and not is_operation(known) then return {'wrong_type', KEYS[3]} end
local version = redis.call('GET', KEYS[7]) or '0'
if not integer_of(version) then return {'wrong_type', KEYS[7]} end
local ledger = redis.call('HMGET', KEYS[6], 'slot', 'seq', 'breach', 'breach_version', 'breach_at', 'balance',
  unpack(ARGV, 2))
local slot = integer_of(ledger[1])
local function packed(key)
  if not slot then return '' end
  return redis.call('GETRANGE', key, slot * 8, slot * 8 + 7)
end

local known_row = {}
for i = 1, #ARGV do known_row[i] = ledger[5 + i] or '' end

local symbols = {}
for i = 11, #KEYS, 4 do
  local bad = wrong_type(KEYS[i + 1], 'hash') or wrong_type(KEYS[i + 2], 'string') or wrong_type(KEYS[i + 3], 'string')
  if bad then return bad end
  local price = ''
  if not wrong_type(KEYS[i], 'string') then price = redis.call('GET', KEYS[i]) or '' end
  local mark = redis.call('HMGET', KEYS[i + 1], 'price', 'timestamp')
  if mark[2] and not string.match(mark[2], '^%d+$') then return {'wrong_type', KEYS[i + 1]} end
  symbols[#symbols + 1] = {price, mark[1] or '', mark[2] or '', packed(KEYS[i + 2]), packed(KEYS[i + 3])}
end

return {
  'ok', known, redis.call('GET', KEYS[4]) or '', redis.call('HGETALL', KEYS[5]),
  {ledger[1] or '', ledger[2] or '', ledger[3] or '', ledger[4] or '', ledger[5] or ''},
  version, redis.call('GET', KEYS[8]) or '', now_us(),
  packed(KEYS[9]), packed(KEYS[10]), symbols, known_row,
}
