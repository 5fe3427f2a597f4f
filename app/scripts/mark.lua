-- Accept a mark, or adopt one that was set by hand: compare-and-set on what was read, so an older one never wins.
--
-- KEYS: state:epoch, state:run_id, mark:version, mark_price, mark
-- ARGV: 1 signature, 2 symbol, 3 mark_price read, 4 price accepted last, 5 version read, 6 new price, 7 channel
-- Answers ok version time, conflict, or a refusal.
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local bad = wrong_type(KEYS[3], 'string') or wrong_type(KEYS[5], 'hash')
if bad then return bad end
local price = ''
if not wrong_type(KEYS[4], 'string') then price = redis.call('GET', KEYS[4]) or '' end
local version = integer_of(redis.call('GET', KEYS[3]) or '0')
if not version then return {'wrong_type', KEYS[3]} end
local mark = redis.call('HMGET', KEYS[5], 'price', 'version')
if price ~= ARGV[3] or (mark[1] or '') ~= ARGV[4] or (mark[2] or '') ~= ARGV[5] then return {'conflict'} end

local time = now_us()
version = string.format('%d', version + 1)
redis.call('SET', KEYS[3], version)
redis.call('SET', KEYS[4], ARGV[6])
redis.call('HSET', KEYS[5], 'price', ARGV[6], 'version', version, 'timestamp', time)
redis.call('PUBLISH', ARGV[7], ARGV[2])
return {'ok', version, time}
