-- Open or end the breaches of some accounts, each once, and only if the account is still the one that was judged.
--
-- Each verdict is judged on its own: one that is refused keeps no other from being recorded. All of them are checked
-- before the first is written. What lies close together in the column is read and written by one command for all.
--
-- KEYS: state:epoch, state:run_id, history:last_id, outbox, columns:breach, accounts, counters:liquidations,
--       counters:recoveries, columns:changed, then of all verdicts: account balances, positions, account ledgers
-- ARGV: signature, mark version judged at, epoch that the slots are of, number of symbols, their names, then of all
--       verdicts: slots of the accounts, packed (-1 for one that is not known), breaches judged, packed (0 for none:
--       such a verdict opens one, every other ends it), accounts, balances judged, bodies, and of each its positions
--       judged, one in each symbol ('' for flat)
-- Answers ok epoch time, the id of the first row, and per verdict: the seq of its row (ids are given in the order of
-- the verdicts), stale (read and judge again), settled (another watchdog was first) or {wrong_type, key}. A refusal of
-- the guard is of all of them.
local refused, epoch = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local kinds = {[5] = 'string', [6] = 'list', [7] = 'string', [8] = 'string'}
for i = 5, 8 do
  local bad = wrong_type(KEYS[i], kinds[i])
  if bad then return bad end
end
local short = short_of(KEYS[6], {KEYS[5]})
if short then return short end
local noted, bad_noted = changes_noted(KEYS[9])
if bad_noted then return bad_noted end
local first_id = next_history_id(KEYS[3], KEYS[4])
if not first_id then return {'wrong_type', KEYS[3]} end
for i = 7, 8 do
  if not integer_of(redis.call('GET', KEYS[i]) or '0') then return {'wrong_type', KEYS[i]} end
end

local version = tonumber(ARGV[2])
local symbols = {unpack(ARGV, 5, 4 + tonumber(ARGV[4]))}
local slots_known, breaches = ARGV[5 + #symbols], ARGV[6 + #symbols]
local count = (#KEYS - 9) / 3
local positions, ledgers = 9 + count, 9 + 2 * count
local accounts = 6 + #symbols
local judged, bodies, records = accounts + count, accounts + 2 * count, accounts + 3 * count
local balances = redis.call('MGET', unpack(KEYS, 10, 9 + count))

-- The breach that the i-th verdict was judged in, as the ledger has it.
local function breach_judged(i)
  local packed = string.sub(breaches, i * 8 - 7, i * 8)
  if packed == '\0\0\0\0\0\0\0\0' then return '' end
  return string.format('%d', struct.unpack('<i8', packed))
end

-- Whether the positions held, names and values in any order, are those that the i-th verdict was judged on.
local function is_judged(held, i)
  local known = 0
  for number = 1, #symbols do
    local value = ''
    for at = 1, #held, 2 do
      if held[at] == symbols[number] then
        -- One that is flat has no field: this is no position.
        if held[at + 1] == '' then return false end
        value = held[at + 1]
        known = known + 2
      end
    end
    if value ~= ARGV[records + (i - 1) * #symbols + number] then return false end
  end
  return known == #held
end

-- Why the verdict on the i-th account cannot be recorded, or the slot and seq that its ledger has.
local function check(i)
  -- MGET answers nothing for a key of another type.
  local bad = not balances[i] and wrong_type(KEYS[9 + i], 'string')
  if bad then return bad end
  local held, ledger
  held, bad = read('HGETALL', KEYS[positions + i])
  if bad then return bad end
  ledger, bad = read('HMGET', KEYS[ledgers + i], 'slot', 'seq', 'breach', 'breach_version')
  if bad then return bad end
  local last_version = integer_of(ledger[4] or '0')
  if ledger[4] == '' then last_version = 0 end
  if not last_version then return {'wrong_type', KEYS[ledgers + i]} end
  if (ledger[3] or '') ~= breach_judged(i) then return 'settled' end
  if last_version > version then return 'stale' end
  if (balances[i] or '') ~= ARGV[judged + i] or not is_judged(held, i) then return 'stale' end
  local slot, seq = integer_of(ledger[1] or ''), integer_of(ledger[2] or '')
  if not slot or not seq then return 'stale' end
  return nil, slot, seq
end

-- A slot that is not the account's own would write into another's row, or far beyond the end. Nobody takes an account
-- out of the list within an epoch, so one that was read with its slot is not looked up again.
local function has_slot(i, slot, packed)
  if ARGV[3] == epoch and string.sub(slots_known, i * 8 - 7, i * 8) == packed then return true end
  return redis.call('LINDEX', KEYS[6], slot) == ARGV[accounts + i]
end

local outcomes, accepted, places, changed, seen = {}, {}, {}, {}, {}
for i = 1, count do
  local bad, slot, seq = check(i)
  -- An account that the list of accounts names twice has two rows, and one breach.
  if seen[ARGV[accounts + i]] then bad = 'stale' end
  seen[ARGV[accounts + i]] = true
  local packed = not bad and struct.pack('<i8', slot)
  if packed and not has_slot(i, slot, packed) then bad = {'wrong_type', KEYS[ledgers + i]} end
  if not bad then
    accepted[#accepted + 1] = i
    places[#accepted], changed[#accepted] = slot, packed
  end
  outcomes[i] = bad or seq + 1
end

-- The last of the rows from the first on that lie close together in the column, each behind the last one.
local function close_to(first)
  local last = first
  while places[last + 1] and places[last + 1] > places[last] and places[last + 1] - places[last] <= 32 do
    last = last + 1
  end
  return last
end

-- Everything is checked; from here on only writes. The first may still be refused for want of memory, the others not.
local time = now_us()
local opened, packed = 0, {}
for at, i in ipairs(accepted) do
  local seq, id, kind = string.format('%d', outcomes[i]), first_id + at - 1, 'recovery'
  if breach_judged(i) == '' then kind = 'liquidation' end
  local text = append_history(KEYS[4], id, kind, ARGV[accounts + i], seq, epoch, time, ARGV[bodies + i])
  if kind == 'liquidation' then
    redis.call('HSET', KEYS[ledgers + i], 'seq', seq, 'breach', text, 'breach_at', time, 'breach_version', ARGV[2])
    packed[at] = struct.pack('<i8', id)
    opened = opened + 1
  else
    redis.call('HSET', KEYS[ledgers + i], 'seq', seq, 'breach', '', 'breach_at', '', 'breach_version', ARGV[2])
    packed[at] = '\0\0\0\0\0\0\0\0'
  end
end
local from = 1
while from <= #accepted do
  local last = close_to(from)
  local begin = places[from] * 8
  local column = redis.call('GETRANGE', KEYS[5], begin, places[last] * 8 + 7)
  local parts, kept = {}, 1
  for at = from, last do
    local before = places[at] * 8 - begin
    parts[#parts + 1] = string.sub(column, kept, before)
    parts[#parts + 1] = packed[at]
    kept = before + 9
  end
  redis.call('SETRANGE', KEYS[5], begin, table.concat(parts))
  from = last + 1
end
if #accepted > 0 then
  note_changes(KEYS[9], noted, table.concat(changed))
  redis.call('SET', KEYS[3], string.format('%d', first_id + #accepted - 1))
  redis.call('INCRBY', KEYS[7], opened)
  redis.call('INCRBY', KEYS[8], #accepted - opened)
end
return {'ok', epoch, time, string.format('%d', first_id), outcomes}
