-- Whether this process may write. Writes nothing.
--
-- KEYS: state:epoch, state:run_id
-- ARGV: signature
local refused = refusal(KEYS[1], KEYS[2], ARGV[1])
if refused then return refused end
return {'ok'}
