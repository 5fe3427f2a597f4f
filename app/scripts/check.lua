-- Whether this process may write, the mark version, and the version swept. Writes nothing.
--
-- KEYS: state:epoch, state:run_id, mark:version, state:swept
-- ARGV: signature
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
local bad = wrong_type(KEYS[3], 'string') or wrong_type(KEYS[4], 'hash')
if bad then return bad end
local memory = redis.call('INFO', 'memory')
local used, maximum = string.match(memory, 'used_memory:(%d+)'), string.match(memory, 'maxmemory:(%d+)')
if maximum ~= '0' and tonumber(used) > tonumber(maximum) then return {'out_of_memory'} end
return {'ok', redis.call('GET', KEYS[3]) or '0', redis.call('HGET', KEYS[4], 'version') or '0'}
