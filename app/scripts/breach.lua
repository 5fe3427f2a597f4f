-- Open or end the breach of one account, once, if the account is still the one that was judged.
--
-- KEYS: state:epoch, state:run_id, history:last_id, outbox, account balance, positions, account ledger,
--       columns:breach, counter (of liquidations or recoveries), accounts
-- ARGV: 1 signature, 2 account, 3 kind (liquidation or recovery), 4 mark version judged at, 5 balance judged,
--       6 breach judged ('' for none), 7 body, then the fields and values of the positions judged
-- Answers ok id seq time epoch, stale (read and judge again), settled (another watchdog was first), or a refusal.
local refused, epoch = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local kinds = {[5] = 'string', [6] = 'hash', [7] = 'hash', [8] = 'string', [9] = 'string', [10] = 'list'}
for i = 5, 10 do
  local bad = wrong_type(KEYS[i], kinds[i])
  if bad then return bad end
end
local id = next_history_id(KEYS[3], KEYS[4])
if not id then return {'wrong_type', KEYS[3]} end
if not integer_of(redis.call('GET', KEYS[9]) or '0') then return {'wrong_type', KEYS[9]} end

local ledger = redis.call('HMGET', KEYS[7], 'slot', 'seq', 'breach', 'breach_version')
local last_version = integer_of(ledger[4] or '0')
if ledger[4] == '' then last_version = 0 end
if not last_version then return {'wrong_type', KEYS[7]} end
if (ledger[3] or '') ~= ARGV[6] then return {'settled'} end
if last_version > tonumber(ARGV[4]) then return {'stale'} end
local fields = {}
for i = 8, #ARGV do fields[#fields + 1] = ARGV[i] end
if not record_is(KEYS[5], KEYS[6], ARGV[5], fields) then return {'stale'} end
local slot, seq = integer_of(ledger[1] or ''), integer_of(ledger[2] or '')
if not slot or not seq then return {'stale'} end
if redis.call('LINDEX', KEYS[10], slot) ~= ARGV[2] then return {'wrong_type', KEYS[7]} end

local time = now_us()
seq = seq + 1
local text = append_history(KEYS[4], id, ARGV[3], ARGV[2], seq, epoch, time, ARGV[7])
redis.call('SET', KEYS[3], text)
if ARGV[3] == 'liquidation' then
  redis.call('HSET', KEYS[7], 'seq', seq, 'breach', text, 'breach_at', time, 'breach_version', ARGV[4])
  redis.call('SETRANGE', KEYS[8], slot * 8, struct.pack('<i8', id))
else
  redis.call('HSET', KEYS[7], 'seq', seq, 'breach', '', 'breach_at', '', 'breach_version', ARGV[4])
  redis.call('SETRANGE', KEYS[8], slot * 8, '\0\0\0\0\0\0\0\0')
end
redis.call('INCR', KEYS[9])
return {'ok', text, seq, time, epoch}
