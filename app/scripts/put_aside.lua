-- Put aside what no script wrote into the outbox, and let the stream take the id of the next row.
--
-- A stream takes no id below its last one, even if that entry is gone: an entry that somebody adds without an id has the
-- time for one, far beyond those of rows, and each commit after it would break. Such ids are found here, also where
-- somebody took the entry back; what is odd and has the id of a row is named by the caller, who can read rows.
--
-- The stream is made anew from what it holds, for no command of every version of Redis lowers its last id. Where it holds
-- more than is good for one call, that waits for the drain.
--
-- KEYS: outbox, outbox:dead, history:last_id
-- ARGV: ids of entries that are no rows
-- Answers ok and how many entries were put aside.
local bad = wrong_type(KEYS[1], 'stream') or wrong_type(KEYS[2], 'stream')
if bad then return bad end
if redis.call('EXISTS', KEYS[1]) == 0 then return {'ok', 0} end

local odd = {}
for i = 1, #ARGV do odd[i] = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1] end

-- Beyond the last id there is no row, unless that was set back by hand: then it is what has to be mended.
local info, newest = redis.pcall('XINFO', 'STREAM', KEYS[1]), '0'
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then newest = string.match(info[i + 1], '^%d+') end
end
local last = integer_of(read('GET', KEYS[3]))
local blocked = last and tonumber(newest) > last
if blocked then
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], string.format('%d-0', last + 1), '+')) do
    odd[#odd + 1] = entry
    local value = #entry[2] == 2 and entry[2][2] or ''
    if entry[2][1] == 'kind' or string.match(value, '^[^\n]+\n%d+\n%d+\n%d+\n{') then blocked = false end
  end
  if not blocked then odd = {} end
end

local aside = 0
for _, entry in ipairs(odd) do
  if redis.call('XDEL', KEYS[1], entry[1]) == 1 then
    redis.call('XADD', KEYS[2], '*', 'reason', 'not a row', unpack(entry[2]))
    aside = aside + 1
  end
end
if blocked and redis.call('XLEN', KEYS[1]) <= 20000 then
  local rows = redis.call('XRANGE', KEYS[1], '-', '+')
  redis.call('DEL', KEYS[1])
  for _, entry in ipairs(rows) do redis.call('XADD', KEYS[1], entry[1], unpack(entry[2])) end
end
return {'ok', aside}
