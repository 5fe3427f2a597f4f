-- Commit decided changes of accounts: of each its record, its row in the columns, its history. All of it, or nothing.
--
-- Each change is judged on its own: one that is refused keeps no other from being committed. All of them are checked
-- before the first is written, so of two changes of one account the later finds that it has moved.
--
-- KEYS: 1 state:epoch, 2 state:run_id, 3 history:last_id, 4 outbox, 5 accounts, 6 columns:balance, 7 columns:breach,
--       8 counters:recoveries, 9 mark:version, 10 state:halted, 11 columns:changed, then per symbol: mark_price, mark,
--       columns quantity, columns cost, then per symbol: columns open, then per change: operation, account balance,
--       positions, account ledger, account equity, account used_margin
-- ARGV: 1 signature, 2 operation seconds, 3 number of symbols, their names, then per change:
--       0 number of its arguments, 1 account, 2 kind, 3 mark version, 4 outbox limit, 5 '' for no operation,
--       6 balance read, 7 seq read, 8 breach read, 9 balance, 10 balance packed, 11 equity, 12 used_margin, 13 body,
--       14 recovery body ('' keeps the breach as it is), 15 epoch guessed ('' for what was read),
--       16 number of symbols touched (all of them for a new account), per symbol: its number, value ('' for flat),
--       quantity and cost packed, then number of fields read, fields and values read, then of a guess per symbol: its
--       mark ('' for one that the guess does not rest on)
-- Answers ok, and per change: {ok, id, seq, time, recovery id, epoch}, {duplicate, operation}, {conflict} or a refusal.
-- A guess that is wrong is answered with what read_account would have found, after the word conflict.
local refused, epoch = refusal(KEYS[1], KEYS[2], ARGV[1])
local waiting, bad_outbox = read('XLEN', KEYS[4])
refused = refused or bad_outbox

local symbols, names, marks = {}, {}, {}
for i = 1, tonumber(ARGV[3]) do
  symbols[i] = ARGV[3 + i]
  names[i] = 'position:' .. symbols[i]
  marks[i] = read('GET', KEYS[8 + 4 * i])
end
local first_open = 11 + 4 * #symbols
local mark_version, halted = read('GET', KEYS[9]), read('EXISTS', KEYS[10])

-- What no change can be committed without.
local id = integer_of(read('GET', KEYS[3]))
local noted, damaged = changes_noted(KEYS[11])
damaged = damaged or short_of(KEYS[5], {KEYS[6], KEYS[7]})
if not id then damaged = {'wrong_type', KEYS[3]} end

-- Why rows of a symbol cannot be written: looked up once, for the changes that touch it.
local faults_of_symbols = {}
local function fault_of_symbol(i)
  if faults_of_symbols[i] == nil then
    local open
    local fault = short_of(KEYS[5], {KEYS[10 + 4 * i], KEYS[11 + 4 * i]})
    if not fault then open, fault = read('GET', KEYS[first_open + i]) end
    if not fault and not integer_of((string.gsub(open or '0', '^%-', ''))) then
      fault = {'wrong_type', KEYS[first_open + i]}
    end
    faults_of_symbols[i] = fault or false
  end
  return faults_of_symbols[i]
end

-- What comes of each change, what has to be written of those that pass, the accounts of these, and their rows of history.
local outcomes, accepted, seen, rows = {}, {}, {}, 0

-- Why the change whose keys begin at key and whose arguments at first cannot be committed, or nil, the account's ledger,
-- its slot and its seq.
local function check(key, first)
  local bad
  if ARGV[first + 5] ~= '' then
    local known
    known, bad = read('GET', KEYS[key])
    if bad then return bad end
    if known and not is_operation(known) then return {'wrong_type', KEYS[key]} end
    if known then return {'duplicate', known} end
  end
  if refused then return refused end
  if waiting + rows >= tonumber(ARGV[first + 4]) then return {'outbox_full'} end

  local balance, held, ledger
  ledger, bad = read('HMGET', KEYS[key + 3], 'slot', 'seq', 'breach', unpack(names))
  if bad then return bad end
  balance, bad = read('GET', KEYS[key + 1])
  if bad then return bad end
  held, bad = read('HGETALL', KEYS[key + 2])
  if bad then return bad end
  local touched = first + 17
  local fields = touched + 3 * tonumber(ARGV[first + 16])
  local count = tonumber(ARGV[fields])
  local unchanged = (ledger[2] or '') == ARGV[first + 7] and (ledger[3] or '') == ARGV[first + 8]
    and (balance or '') == ARGV[first + 6] and #held == 2 * count
  local values = {}
  for i = 1, #held, 2 do values[held[i]] = held[i + 1] end
  for i = 1, count do unchanged = unchanged and values[ARGV[fields + 2 * i - 1]] == ARGV[fields + 2 * i] end
  -- What was guessed has to be what a read would have found; whatever else is there is answered, and judged then.
  if ARGV[first + 15] ~= '' then
    unchanged = unchanged and ARGV[first + 15] == epoch and mark_version == ARGV[first + 3] and halted == 0
    for i = 1, #symbols do
      local mark = ARGV[fields + 2 * count + i]
      unchanged = unchanged and (mark == '' or marks[i] == mark)
    end
    if not unchanged then
      local found
      found, bad = account_as_it_is(KEYS[key], KEYS[key + 1], KEYS[key + 2], KEYS[key + 3], KEYS[9], KEYS[10], KEYS[6],
        KEYS[7], 12, symbols)
      if bad then return bad end
      return {'conflict', unpack(found)}
    end
  end
  if not unchanged or seen[KEYS[key + 1]] then return {'conflict'} end

  if damaged then return damaged end
  local slot, seq = integer_of(ledger[1] or ''), integer_of(ledger[2] or '0')
  if not seq or (ledger[1] and not slot) then return {'wrong_type', KEYS[key + 3]} end
  if ledger[3] and ledger[3] ~= '' and not integer_of(ledger[3]) then return {'wrong_type', KEYS[key + 3]} end
  -- A slot that is not the account's own would write into another's row, or far beyond the end.
  if slot and redis.call('LINDEX', KEYS[5], slot) ~= ARGV[first + 1] then return {'wrong_type', KEYS[key + 3]} end
  for i = touched, fields - 1, 3 do
    local fault = fault_of_symbol(tonumber(ARGV[i]))
    if fault then return fault end
  end
  if ARGV[first + 14] ~= '' then
    local recoveries
    recoveries, bad = read('GET', KEYS[8])
    if bad then return bad end
    if not integer_of(recoveries or '0') then return {'wrong_type', KEYS[8]} end
  end
  return nil, ledger, slot, seq
end

-- By how much a change moves the number of open positions of the symbol whose arguments begin at i.
local function opened_by(i, number, ledger, slot)
  local opened = ARGV[i + 1] ~= '' and 1 or 0
  if slot then
    local before = ledger[3 + number] or redis.call('GETRANGE', KEYS[10 + 4 * number], slot * 8, slot * 8 + 7)
    if string.sub(before, 1, 8) ~= '\0\0\0\0\0\0\0\0' then opened = opened - 1 end
  end
  return opened
end

local first = 4 + #symbols
for key = first_open + #symbols + 1, #KEYS, 6 do
  local bad, ledger, slot, seq = check(key, first)
  outcomes[#outcomes + 1] = bad or {}
  if not bad then
    accepted[#accepted + 1] = {#outcomes, key, first, ledger, slot, seq}
    seen[KEYS[key + 1]] = true
    rows = rows + (ARGV[first + 14] == '' and 1 or 2)
  end
  first = first + tonumber(ARGV[first])
end
if #accepted == 0 then return {'ok', unpack(outcomes)} end

-- Everything is checked; from here on only writes. The first may still be refused for want of memory, the others not.
-- The keys of equity and used_margin are only ever SET, which takes a key of any type.
redis.call('SET', KEYS[3], string.format('%d', id + rows))
local time, changed, opened = now_us(), {}, {}
for _, change in ipairs(accepted) do
  local at, key, first, ledger, slot, seq = change[1], change[2], change[3], change[4], change[5], change[6]
  id = id + 1
  seq = seq + 1
  local text = append_history(KEYS[4], id, ARGV[first + 2], ARGV[first + 1], seq, epoch, time, ARGV[first + 13])
  local recovery, last_seq, row = '', seq, {}
  if ARGV[first + 14] ~= '' then
    id = id + 1
    last_seq = seq + 1
    recovery = append_history(KEYS[4], id, 'recovery', ARGV[first + 1], last_seq, epoch, time, ARGV[first + 14])
  end
  local known_slot = slot
  if not slot then
    slot = redis.call('RPUSH', KEYS[5], ARGV[first + 1]) - 1
    redis.call('SETRANGE', KEYS[7], slot * 8, '\0\0\0\0\0\0\0\0')
    row = {'slot', slot}
  end
  redis.call('SETRANGE', KEYS[6], slot * 8, ARGV[first + 10])
  if ARGV[first + 11] ~= '' then
    redis.call('MSET', KEYS[key + 1], ARGV[first + 9], KEYS[key + 4], ARGV[first + 11], KEYS[key + 5], ARGV[first + 12])
  else
    redis.call('SET', KEYS[key + 1], ARGV[first + 9])
  end
  row[#row + 1] = 'seq'
  row[#row + 1] = last_seq
  row[#row + 1] = 'balance'
  row[#row + 1] = ARGV[first + 10]
  for i = first + 17, first + 14 + 3 * tonumber(ARGV[first + 16]), 3 do
    local number, packed = tonumber(ARGV[i]), ARGV[i + 2]
    opened[number] = (opened[number] or 0) + opened_by(i, number, ledger, known_slot)
    if ARGV[i + 1] == '' then
      redis.call('HDEL', KEYS[key + 2], symbols[number])
    else
      redis.call('HSET', KEYS[key + 2], symbols[number], ARGV[i + 1])
    end
    redis.call('SETRANGE', KEYS[10 + 4 * number], slot * 8, string.sub(packed, 1, 8))
    redis.call('SETRANGE', KEYS[11 + 4 * number], slot * 8, string.sub(packed, 9))
    row[#row + 1] = names[number]
    row[#row + 1] = packed
  end
  redis.call('HSET', KEYS[key + 3], unpack(row))
  if recovery ~= '' then
    redis.call('HSET', KEYS[key + 3], 'breach', '', 'breach_at', '', 'breach_version', ARGV[first + 3])
    redis.call('SETRANGE', KEYS[7], slot * 8, '\0\0\0\0\0\0\0\0')
    redis.call('INCR', KEYS[8])
  end
  if ARGV[first + 2] == 'adjustment' then
    redis.call('SETRANGE', KEYS[7], slot * 8, struct.pack('<i8', integer_of(ledger[3]) or 0))
  end
  if ARGV[first + 5] ~= '' then
    redis.call('SET', KEYS[key], text .. '\n' .. time .. '\n' .. ARGV[first + 13], 'EX', ARGV[2])
  end
  changed[#changed + 1] = struct.pack('<i8', slot)
  outcomes[at] = {'ok', text, seq, time, recovery, epoch}
end
for number, count in pairs(opened) do
  if count ~= 0 then redis.call('INCRBY', KEYS[first_open + number], count) end
end
note_changes(KEYS[11], noted, table.concat(changed))
return {'ok', unpack(outcomes)}
