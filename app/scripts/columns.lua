-- Put columns that were made anew in the place of those that were lost or cut. Nothing else writes into a short one.
--
-- KEYS: state:epoch, state:run_id, accounts, columns:changed, then per column: the column, what was made to replace it,
--       and the counter of open positions that goes with it (the column again where none does)
-- ARGV: signature, number of accounts, then per column: the open positions ('' without a counter)
-- Answers ok and how many columns were short, conflict when accounts have come or what was made is gone, or a refusal.
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local slots, bad = read('LLEN', KEYS[3])
if bad then return bad end
if slots ~= tonumber(ARGV[2]) then return {'conflict'} end
local short = {}
for i = 5, #KEYS, 3 do
  bad = wrong_type(KEYS[i + 2], 'string')
  if bad then return bad end
  local bytes, made
  bytes, bad = read('STRLEN', KEYS[i])
  if bad then return bad end
  made, bad = read('STRLEN', KEYS[i + 1])
  if bad then return bad end
  if made ~= slots * 8 then return {'conflict'} end
  if bytes < made then short[#short + 1] = i end
end

forget_changes(KEYS[4])
for _, i in ipairs(short) do
  redis.call('SET', KEYS[i], redis.call('GET', KEYS[i + 1]))
  local opened = ARGV[(i + 4) / 3]
  if opened ~= '' then redis.call('SET', KEYS[i + 2], opened) end
end
for i = 5, #KEYS, 3 do redis.call('DEL', KEYS[i + 1]) end
return {'ok', #short}
