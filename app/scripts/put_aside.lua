-- Put aside what somebody added to the outbox with the time for an id, and let the stream take the id of the next row.
--
-- A stream takes no id below its last one, even if that entry is gone, so that each commit after it would break. No
-- command of every version of Redis lowers a last id: the stream is made anew from what it holds. Only an id that no row
-- can have is mended so. Where the counter was set back, a refused commit is what keeps an id from being given twice.
--
-- KEYS: outbox, outbox:dead, history:last_id, outbox:anew
-- Answers ok and how many entries were put aside.
local times = 1000000000000
local words_kept, rows_at_once = 1000, 20000

local bad = wrong_type(KEYS[1], 'stream') or wrong_type(KEYS[2], 'stream')
if bad then return bad end
local last = integer_of(read('GET', KEYS[3]))
if not last or last >= times or redis.call('EXISTS', KEYS[1]) == 0 then return {'ok', 0} end

local info, newest = redis.pcall('XINFO', 'STREAM', KEYS[1]), '0'
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then newest = string.match(info[i + 1], '^%d+') end
end
if tonumber(newest) < times or redis.call('XLEN', KEYS[1]) > rows_at_once then return {'ok', 0} end

local odd = redis.call('XRANGE', KEYS[1], string.format('%d-0', times), '+')
local rows = redis.call('XRANGE', KEYS[1], '-', string.format('(%d-0', times))
-- What has more words than can be handed to a command was not written by a script: it is for somebody to look at.
for _, entry in ipairs(rows) do
  if #entry[2] > words_kept then return {'ok', 0} end
end

-- One that looks as append_history writes a row is the drain's to judge: the counter may have been beyond it. Gone, it is mended as well.
for _, entry in ipairs(odd) do
  local value = #entry[2] == 2 and entry[2][2] or ''
  if string.match(value, '^[^\n]+\n%d+\n%d+\n%d+\n{') then return {'ok', 0} end
end

for _, entry in ipairs(odd) do
  redis.call('XADD', KEYS[2], '*', 'reason', 'not a row', unpack(entry[2], 1, math.min(#entry[2], words_kept)))
end
redis.call('DEL', KEYS[4])
for _, entry in ipairs(rows) do redis.call('XADD', KEYS[4], entry[1], unpack(entry[2])) end
if #rows > 0 then
  redis.call('RENAME', KEYS[4], KEYS[1])
else
  redis.call('DEL', KEYS[1])
end
return {'ok', #odd}
