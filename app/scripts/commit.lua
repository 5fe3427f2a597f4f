-- Commit one decided change of an account: its record, its row in the columns, its history. All of it, or nothing.
--
-- KEYS: state:epoch, state:run_id, history:last_id, outbox, operation, account balance, positions, account ledger,
--       account equity, account used_margin, accounts, columns:balance, columns:breach, counters:recoveries,
--       mark:version, state:halted, columns:changed, then per symbol touched (all of them for a new account):
--       columns quantity, columns cost, columns open, then of a guess per symbol: mark_price, mark, columns quantity,
--       columns cost
-- ARGV: 1 signature, 2 account, 3 kind, 4 mark version, 5 outbox limit, 6 operation seconds, 7 '' for no operation,
--       8 balance read, 9 seq read, 10 breach read, 11 balance, 12 balance packed, 13 equity, 14 used_margin, 15 body,
--       16 recovery body ('' keeps the breach as it is), 17 epoch guessed ('' for what was read),
--       18 number of symbols touched, per symbol: its name, value ('' for flat), quantity packed, cost packed,
--       then number of fields read, fields and values read, then of a guess per symbol: its name, its mark ('' for one
--       that the guess does not rest on)
-- Answers ok id seq time recovery_id epoch, duplicate operation, conflict, or a refusal. A guess that is wrong is
-- answered with what read_account would have found, after the word conflict.
local known, bad
if ARGV[7] ~= '' then
  known, bad = read('GET', KEYS[5])
  if bad then return bad end
  if known then
    if not is_operation(known) then return {'wrong_type', KEYS[5]} end
    return {'duplicate', known}
  end
end

local refused, epoch = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local waiting
waiting, bad = read('XLEN', KEYS[4])
if bad then return bad end
if waiting >= tonumber(ARGV[5]) then return {'outbox_full'} end

local touched_count = tonumber(ARGV[18])
local first = 19 + touched_count * 4
local fields, names = {}, {}
for i = 1, tonumber(ARGV[first]) * 2 do fields[i] = ARGV[first + i] end
for i = 1, touched_count do names[i] = 'position:' .. ARGV[15 + 4 * i] end

local ledger, balance, held
ledger, bad = read('HMGET', KEYS[8], 'slot', 'seq', 'breach', unpack(names))
if bad then return bad end
balance, bad = read('GET', KEYS[6])
if bad then return bad end
held, bad = read('HLEN', KEYS[7])
if bad then return bad end
local unchanged = (ledger[2] or '') == ARGV[9] and (ledger[3] or '') == ARGV[10]
  and (balance or '') == ARGV[8] and held * 2 == #fields
for i = 1, #fields, 2 do unchanged = unchanged and read('HGET', KEYS[7], fields[i]) == fields[i + 1] end
-- What was guessed has to be what a read would have found; whatever else is there is answered, and judged then.
if ARGV[17] ~= '' then
  local symbols, at, first_symbol = {}, first + #fields + 1, 18 + touched_count * 3
  unchanged = unchanged and ARGV[17] == epoch and read('GET', KEYS[15]) == ARGV[4] and read('EXISTS', KEYS[16]) == 0
  for i = 1, (#KEYS - first_symbol + 1) / 4 do
    symbols[i] = ARGV[at + 2 * i - 2]
    local mark = ARGV[at + 2 * i - 1]
    unchanged = unchanged and (mark == '' or read('GET', KEYS[first_symbol + 4 * i - 4]) == mark)
  end
  if not unchanged then
    local found
    found, bad = account_as_it_is(KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[15], KEYS[16], KEYS[12], KEYS[13],
      first_symbol, symbols)
    if bad then return bad end
    return {'conflict', unpack(found)}
  end
end
if not unchanged then return {'conflict'} end

local last_id
last_id, bad = read('GET', KEYS[3])
local id = not bad and integer_of(last_id)
if not id then return {'wrong_type', KEYS[3]} end
id = id + 1
local seq = integer_of(ledger[2] or '0')
local slot = integer_of(ledger[1] or '')
if not seq or (ledger[1] and not slot) then return {'wrong_type', KEYS[8]} end
if ledger[3] and ledger[3] ~= '' and not integer_of(ledger[3]) then return {'wrong_type', KEYS[8]} end
local columns = {KEYS[12], KEYS[13]}
for i = 1, touched_count do
  columns[#columns + 1] = KEYS[15 + 3 * i]
  columns[#columns + 1] = KEYS[16 + 3 * i]
end
bad = short_of(KEYS[11], columns)
if bad then return bad end
local noted
noted, bad = changes_noted(KEYS[17])
if bad then return bad end
-- A slot that is not the account's own would write into another's row, or far beyond the end.
if slot and redis.call('LINDEX', KEYS[11], slot) ~= ARGV[2] then return {'wrong_type', KEYS[8]} end
local touched = {}
for i = 1, touched_count do
  local key, argument = 15 + 3 * i, 15 + 4 * i
  local open = 0
  if slot then
    local before = ledger[3 + i] or redis.call('GETRANGE', KEYS[key], slot * 8, slot * 8 + 7)
    if string.sub(before, 1, 8) ~= '\0\0\0\0\0\0\0\0' then open = -1 end
  end
  if ARGV[argument + 1] ~= '' then open = open + 1 end
  if open ~= 0 then
    local count
    count, bad = read('GET', KEYS[key + 2])
    if bad then return bad end
    if not integer_of(string.gsub(count or '0', '^%-', '')) then return {'wrong_type', KEYS[key + 2]} end
  end
  touched[i] = {key, argument, open}
end
if ARGV[16] ~= '' then
  local recoveries
  recoveries, bad = read('GET', KEYS[14])
  if bad then return bad end
  if not integer_of(recoveries or '0') then return {'wrong_type', KEYS[14]} end
end

-- Everything is checked; from here on only writes. The first may still be refused for want of memory, the others not.
-- KEYS[9] and KEYS[10] are only ever SET, which takes a key of any type.
local time = now_us()
local recovery = ''
seq = seq + 1
local text = append_history(KEYS[4], id, ARGV[3], ARGV[2], seq, epoch, time, ARGV[15])
local last_seq = seq
if ARGV[16] ~= '' then
  last_seq = seq + 1
  recovery = append_history(KEYS[4], id + 1, 'recovery', ARGV[2], last_seq, epoch, time, ARGV[16])
end
if not slot then
  slot = redis.call('RPUSH', KEYS[11], ARGV[2]) - 1
  redis.call('SETRANGE', KEYS[13], slot * 8, '\0\0\0\0\0\0\0\0')
end
redis.call('SETRANGE', KEYS[12], slot * 8, ARGV[12])
local newest = recovery ~= '' and recovery or text
if ARGV[13] ~= '' then
  redis.call('MSET', KEYS[6], ARGV[11], KEYS[9], ARGV[13], KEYS[10], ARGV[14], KEYS[3], newest)
else
  redis.call('MSET', KEYS[6], ARGV[11], KEYS[3], newest)
end
local row = {'slot', slot, 'seq', last_seq, 'balance', ARGV[12]}
for _, item in ipairs(touched) do
  local at, i, open = item[1], item[2], item[3]
  if ARGV[i + 1] == '' then redis.call('HDEL', KEYS[7], ARGV[i]) else redis.call('HSET', KEYS[7], ARGV[i], ARGV[i + 1]) end
  redis.call('SETRANGE', KEYS[at], slot * 8, ARGV[i + 2])
  redis.call('SETRANGE', KEYS[at + 1], slot * 8, ARGV[i + 3])
  row[#row + 1] = 'position:' .. ARGV[i]
  row[#row + 1] = ARGV[i + 2] .. ARGV[i + 3]
  if open ~= 0 then redis.call('INCRBY', KEYS[at + 2], open) end
end
redis.call('HSET', KEYS[8], unpack(row))
if recovery ~= '' then
  redis.call('HSET', KEYS[8], 'breach', '', 'breach_at', '', 'breach_version', ARGV[4])
  redis.call('SETRANGE', KEYS[13], slot * 8, '\0\0\0\0\0\0\0\0')
  redis.call('INCR', KEYS[14])
end
if ARGV[3] == 'adjustment' then
  redis.call('SETRANGE', KEYS[13], slot * 8, struct.pack('<i8', integer_of(ledger[3]) or 0))
end
note_changes(KEYS[17], noted, struct.pack('<i8', slot))
if ARGV[7] ~= '' then redis.call('SET', KEYS[5], text .. '\n' .. time .. '\n' .. ARGV[15], 'EX', ARGV[6]) end
return {'ok', text, seq, time, recovery, epoch}
