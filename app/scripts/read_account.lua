-- One account as it stands, the operation that may have been booked already, and the marks. Writes nothing.
--
-- KEYS: state:epoch, state:run_id, operation, account balance, positions, account ledger, mark:version, state:halted,
--       columns:balance, columns:breach, then per symbol: mark_price, mark, columns quantity, columns cost
-- ARGV: signature, then per symbol: its name
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused and refused[1] ~= 'state_unreconciled' then return refused end
local found, bad = account_as_it_is(KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10],
  11, {unpack(ARGV, 2)})
if bad then return bad end
return {'ok', unpack(found)}
