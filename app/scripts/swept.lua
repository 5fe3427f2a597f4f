-- Record that everything up to a mark version has been swept. It only grows; the time is that of the newest sweep.
--
-- KEYS: state:epoch, state:run_id, state:swept, columns:changed
-- ARGV: signature, version, the epoch that was swept
-- Answers ok version, or conflict when another epoch has begun: a sweep of what was there before says nothing of it.
local refused, epoch = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
if epoch ~= ARGV[3] then return {'conflict'} end
local bad = wrong_type(KEYS[3], 'hash')
if bad then return bad end
local noted
noted, bad = changes_noted(KEYS[4])
if bad then return bad end
local swept = integer_of(redis.call('HGET', KEYS[3], 'version') or '0') or 0
local version = math.max(swept, tonumber(ARGV[2]))
redis.call('HSET', KEYS[3], 'version', string.format('%d', version), 'at', now_us())
begin_changes(KEYS[4], noted)
return {'ok', string.format('%d', version)}
