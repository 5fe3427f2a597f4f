-- Open or end the breaches of some accounts, each once, and only if the account is still the one that was judged.
--
-- Each verdict is judged on its own: one that is refused keeps no other from being recorded. All of them are checked
-- before the first is written.
--
-- KEYS: state:epoch, state:run_id, history:last_id, outbox, columns:breach, accounts, counters:liquidations,
--       counters:recoveries, columns:changed, then per verdict: account balance, positions, account ledger
-- ARGV: signature, then per verdict: account, kind (liquidation or recovery), mark version judged at, balance judged,
--       breach judged ('' for none), body, number of positions judged, their fields and values
-- Answers ok epoch time and per verdict: {ok, id, seq}, {stale} (read and judge again), {settled} (another watchdog
-- was first) or {wrong_type, key}. A refusal of the guard is of all of them.
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
local id = next_history_id(KEYS[3], KEYS[4])
if not id then return {'wrong_type', KEYS[3]} end
for i = 7, 8 do
  if not integer_of(redis.call('GET', KEYS[i]) or '0') then return {'wrong_type', KEYS[i]} end
end

-- Why the verdict whose keys begin at key and whose arguments at first cannot be recorded, or its slot and seq.
local function check(key, first, fields)
  local balance, bad = read('GET', KEYS[key])
  if bad then return bad end
  local held
  held, bad = read('HLEN', KEYS[key + 1])
  if bad then return bad end
  local ledger
  ledger, bad = read('HMGET', KEYS[key + 2], 'slot', 'seq', 'breach', 'breach_version')
  if bad then return bad end
  local last_version = integer_of(ledger[4] or '0')
  if ledger[4] == '' then last_version = 0 end
  if not last_version then return {'wrong_type', KEYS[key + 2]} end
  if (ledger[3] or '') ~= ARGV[first + 4] then return {'settled'} end
  if last_version > tonumber(ARGV[first + 2]) then return {'stale'} end
  if (balance or '') ~= ARGV[first + 3] or held * 2 ~= #fields then return {'stale'} end
  for i = 1, #fields, 2 do
    if redis.call('HGET', KEYS[key + 1], fields[i]) ~= fields[i + 1] then return {'stale'} end
  end
  local slot, seq = integer_of(ledger[1] or ''), integer_of(ledger[2] or '')
  if not slot or not seq then return {'stale'} end
  if redis.call('LINDEX', KEYS[6], slot) ~= ARGV[first] then return {'wrong_type', KEYS[key + 2]} end
  return nil, slot, seq
end

local outcomes, accepted, seen = {}, {}, {}
local first = 2
for key = 10, #KEYS, 3 do
  local fields = {}
  for i = 1, tonumber(ARGV[first + 6]) * 2 do fields[i] = ARGV[first + 6 + i] end
  local bad, slot, seq = check(key, first, fields)
  -- An account that the list of accounts names twice has two rows, and one breach.
  if seen[KEYS[key + 2]] then bad = {'stale'} end
  seen[KEYS[key + 2]] = true
  outcomes[#outcomes + 1] = bad or {}
  if not bad then accepted[#accepted + 1] = {#outcomes, key, first, slot, seq + 1} end
  first = first + 7 + #fields
end

-- Everything is checked; from here on only writes. The first may still be refused for want of memory, the others not.
local time = now_us()
local opened, changed = 0, {}
for _, verdict in ipairs(accepted) do
  local at, key, first, slot, seq = verdict[1], verdict[2], verdict[3], verdict[4], verdict[5]
  local kind, version = ARGV[first + 1], ARGV[first + 2]
  local text = append_history(KEYS[4], id, kind, ARGV[first], seq, epoch, time, ARGV[first + 5])
  if kind == 'liquidation' then
    redis.call('HSET', KEYS[key + 2], 'seq', seq, 'breach', text, 'breach_at', time, 'breach_version', version)
    redis.call('SETRANGE', KEYS[5], slot * 8, struct.pack('<i8', id))
    opened = opened + 1
  else
    redis.call('HSET', KEYS[key + 2], 'seq', seq, 'breach', '', 'breach_at', '', 'breach_version', version)
    redis.call('SETRANGE', KEYS[5], slot * 8, '\0\0\0\0\0\0\0\0')
  end
  changed[#changed + 1] = struct.pack('<i8', slot)
  outcomes[at] = {'ok', text, seq}
  id = id + 1
end
if #accepted > 0 then
  note_changes(KEYS[9], noted, table.concat(changed))
  redis.call('SET', KEYS[3], string.format('%d', id - 1))
  redis.call('INCRBY', KEYS[7], opened)
  redis.call('INCRBY', KEYS[8], #accepted - opened)
end
return {'ok', epoch, time, outcomes}
