-- Write the row of one account into the columns, from its ledger: what its last change left.
--
-- KEYS: state:epoch, state:run_id, accounts, account ledger, columns:changed, columns:balance, columns:breach,
--       then per symbol: columns quantity, columns cost
-- ARGV: signature, account, then per symbol: the ledger's field of its position
-- Answers ok, stale when the ledger holds no row, or a refusal.
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local bad = wrong_type(KEYS[3], 'list') or wrong_type(KEYS[4], 'hash')
if bad then return bad end
local columns = {}
for i = 6, #KEYS do
  bad = wrong_type(KEYS[i], 'string')
  if bad then return bad end
  columns[#columns + 1] = KEYS[i]
end
local short = short_of(KEYS[3], columns)
if short then return short end
local noted
noted, bad = changes_noted(KEYS[5])
if bad then return bad end
local nothing = '\0\0\0\0\0\0\0\0'
local ledger = redis.call('HMGET', KEYS[4], 'slot', 'breach', 'balance', unpack(ARGV, 3))
local slot, breach = integer_of(ledger[1] or ''), nothing
if not slot or not ledger[3] then return {'stale'} end
if redis.call('LINDEX', KEYS[3], slot) ~= ARGV[2] then return {'wrong_type', KEYS[4]} end
if ledger[2] and ledger[2] ~= '' then
  if not integer_of(ledger[2]) then return {'wrong_type', KEYS[4]} end
  breach = struct.pack('<i8', integer_of(ledger[2]))
end

redis.call('SETRANGE', KEYS[6], slot * 8, ledger[3])
redis.call('SETRANGE', KEYS[7], slot * 8, breach)
for i = 3, #ARGV do
  local position = ledger[i + 1] or (nothing .. nothing)
  redis.call('SETRANGE', KEYS[2 * i + 2], slot * 8, string.sub(position, 1, 8))
  redis.call('SETRANGE', KEYS[2 * i + 3], slot * 8, string.sub(position, 9, 16))
end
note_changes(KEYS[5], noted, struct.pack('<i8', slot))
return {'ok'}
