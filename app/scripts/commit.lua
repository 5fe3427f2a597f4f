-- Commit one decided change of an account: its record, its row in the columns, its history. All of it, or nothing.
--
-- KEYS: state:epoch, state:run_id, history:last_id, outbox, operation, account balance, positions, account ledger,
--       account equity, account used_margin, accounts, columns:balance, columns:breach, counters:recoveries,
--       then per symbol touched: columns quantity, columns cost, columns open
-- ARGV: 1 signature, 2 account, 3 kind, 4 mark version, 5 outbox limit, 6 operation seconds, 7 '' for no operation,
--       8 balance read, 9 seq read, 10 breach read, 11 balance, 12 balance packed, 13 equity, 14 used_margin, 15 body,
--       16 recovery body ('' keeps the breach as it is), 17 number of fields read, fields and values read,
--       then per symbol touched: field, value ('' for flat), quantity packed, cost packed
-- Answers ok id seq time recovery_id epoch, duplicate operation, conflict, or a refusal.
local operation_kind = wrong_type(KEYS[5], 'string')
if operation_kind then return operation_kind end
if ARGV[7] ~= '' then
  local known = redis.call('GET', KEYS[5])
  if known then
    if not is_operation(known) then return {'wrong_type', KEYS[5]} end
    return {'duplicate', known}
  end
end

local refused, epoch = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
-- KEYS[9] and KEYS[10] are only ever SET, which takes a key of any type.
local kinds = {[6] = 'string', [7] = 'hash', [8] = 'hash', [11] = 'list', [12] = 'string', [13] = 'string',
  [14] = 'string'}
for i, kind in pairs(kinds) do
  local bad = wrong_type(KEYS[i], kind)
  if bad then return bad end
end
for i = 15, #KEYS do
  local bad = wrong_type(KEYS[i], 'string')
  if bad then return bad end
end
local id = next_history_id(KEYS[3], KEYS[4])
if not id then return {'wrong_type', KEYS[3]} end
if not integer_of(redis.call('GET', KEYS[14]) or '0') then return {'wrong_type', KEYS[14]} end
if redis.call('XLEN', KEYS[4]) >= tonumber(ARGV[5]) then return {'outbox_full'} end

local first = 18
local fields = {}
for i = 1, tonumber(ARGV[17]) * 2 do fields[i] = ARGV[first + i - 1] end
first = first + #fields
local ledger = redis.call('HMGET', KEYS[8], 'slot', 'seq', 'breach')
if (ledger[2] or '') ~= ARGV[9] or (ledger[3] or '') ~= ARGV[10]
  or not record_is(KEYS[6], KEYS[7], ARGV[8], fields) then
  return {'conflict'}
end
local seq = integer_of(ledger[2] or '0')
local slot = integer_of(ledger[1] or '')
if not seq or (ledger[1] and not slot) then return {'wrong_type', KEYS[8]} end
-- A slot that is not the account's own would write into another's row, or far beyond the end.
if slot and redis.call('LINDEX', KEYS[11], slot) ~= ARGV[2] then return {'wrong_type', KEYS[8]} end
if ledger[3] and ledger[3] ~= '' and not integer_of(ledger[3]) then return {'wrong_type', KEYS[8]} end
local touched = {}
local key = 15
for i = first, #ARGV, 4 do
  local open = 0
  if slot then
    local before = redis.call('GETRANGE', KEYS[key], slot * 8, slot * 8 + 7)
    if before ~= '' and before ~= '\0\0\0\0\0\0\0\0' then open = -1 end
  end
  if not integer_of(string.gsub(redis.call('GET', KEYS[key + 2]) or '0', '^%-', '')) then
    return {'wrong_type', KEYS[key + 2]}
  end
  if ARGV[i + 1] ~= '' then open = open + 1 end
  touched[#touched + 1] = {key, i, open}
  key = key + 3
end

-- Everything is checked; from here on only writes. The first may still be refused for want of memory, the others not.
local time = now_us()
local recovery = ''
seq = seq + 1
local text = append_history(KEYS[4], id, ARGV[3], ARGV[2], seq, epoch, time, ARGV[15])
local last_seq = seq
if ARGV[16] ~= '' then
  last_seq = seq + 1
  recovery = append_history(KEYS[4], id + 1, 'recovery', ARGV[2], last_seq, epoch, time, ARGV[16])
end
redis.call('SET', KEYS[3], recovery ~= '' and recovery or text)
if not slot then slot = redis.call('RPUSH', KEYS[11], ARGV[2]) - 1 end
redis.call('SET', KEYS[6], ARGV[11])
redis.call('SETRANGE', KEYS[12], slot * 8, ARGV[12])
if ARGV[13] ~= '' then
  redis.call('SET', KEYS[9], ARGV[13])
  redis.call('SET', KEYS[10], ARGV[14])
end
for _, item in ipairs(touched) do
  local at, i, open = item[1], item[2], item[3]
  if ARGV[i + 1] == '' then redis.call('HDEL', KEYS[7], ARGV[i]) else redis.call('HSET', KEYS[7], ARGV[i], ARGV[i + 1]) end
  redis.call('SETRANGE', KEYS[at], slot * 8, ARGV[i + 2])
  redis.call('SETRANGE', KEYS[at + 1], slot * 8, ARGV[i + 3])
  if open ~= 0 then redis.call('INCRBY', KEYS[at + 2], open) end
end
redis.call('HSET', KEYS[8], 'slot', slot, 'seq', last_seq)
if recovery ~= '' then
  redis.call('HSET', KEYS[8], 'breach', '', 'breach_at', '', 'breach_version', ARGV[4])
  redis.call('SETRANGE', KEYS[13], slot * 8, '\0\0\0\0\0\0\0\0')
  redis.call('INCR', KEYS[14])
end
if ARGV[3] == 'adjustment' then
  redis.call('SETRANGE', KEYS[13], slot * 8, struct.pack('<i8', integer_of(ledger[3]) or 0))
end
if ARGV[7] ~= '' then redis.call('SET', KEYS[5], text .. '\n' .. time .. '\n' .. ARGV[15], 'EX', ARGV[6]) end
return {'ok', text, seq, time, recovery, epoch}
