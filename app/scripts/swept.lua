-- Record that everything up to a mark version has been swept. It only grows; the time is that of the newest sweep.
--
-- KEYS: state:epoch, state:run_id, state:swept
-- ARGV: signature, version
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local bad = wrong_type(KEYS[3], 'hash')
if bad then return bad end
local swept = integer_of(redis.call('HGET', KEYS[3], 'version') or '0') or 0
local version = math.max(swept, tonumber(ARGV[2]))
redis.call('HSET', KEYS[3], 'version', string.format('%d', version), 'at', now_us())
return {'ok', string.format('%d', version)}
