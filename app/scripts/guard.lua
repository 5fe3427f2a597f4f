-- Put before every script. It does no arithmetic on money and writes nothing.
--
-- Scripts do not roll back: a command that fails in the middle leaves the writes before it in place. So each script
-- first reads and checks all it will touch, through the functions below, and only then writes.

-- The whole number that text is, as Redis itself writes it, or nil: INCR takes no '007', and Lua is exact to 2^53.
local function integer_of(text)
  if text and #text <= 15 and (text == '0' or string.match(text, '^[1-9]%d*$')) then return tonumber(text) end
  return nil
end

-- Whether text is what an operation id is remembered by: the row's id, its time, its body, a line each.
local function is_operation(text)
  return string.match(text, '^%d+\n%d+\n{') ~= nil
end

-- Answers nil when key holds kind or nothing, else a refusal that names the key.
local function wrong_type(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then return {'wrong_type', key} end
  return nil
end

-- The answer to a command that reads key, or nil and a refusal that names it when it holds another type.
local function read(command, key, ...)
  local answer = redis.pcall(command, key, ...)
  if type(answer) == 'table' and answer.err then return nil, {'wrong_type', key} end
  return answer
end

-- Answers nil when this process may write: the state exists, is not frozen, was written by the same release and
-- contracts (signature), and this run of Redis has been compared with history since it started.
local function refusal(epoch_key, run_id_key, signature)
  local epoch, bad = read('HMGET', epoch_key, 'epoch', 'status', 'signature')
  if bad then return bad end
  if not integer_of(epoch[1]) then return {'state_missing'} end
  if epoch[2] ~= 'ready' then return {'state_frozen'} end
  if epoch[3] ~= signature then return {'state_mismatch', epoch[3] or ''} end
  local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local known
  known, bad = read('GET', run_id_key)
  if bad then return bad end
  if known ~= run_id then return {'state_unreconciled'} end
  return nil, epoch[1]
end

-- The id that the next row of history gets, or nil when the counter cannot be read.
local function next_history_id(last_id_key, outbox_key)
  local last = read('GET', last_id_key)
  if not last or wrong_type(outbox_key, 'stream') then return nil end
  return integer_of(last) and integer_of(last) + 1
end

local function now_us()
  local time = redis.call('TIME')
  return string.format('%d%06d', time[1], time[2])
end

-- History waits here for Postgres. The entry's id is the row's, so that deleting it needs no second name. Its one field
-- is named by the kind of the row and holds the rest, a line each: every word more is made, handed on and synced.
local function append_history(outbox_key, id, kind, account, seq, epoch, time, body)
  local text = string.format('%d', id)
  redis.call('XADD', outbox_key, text .. '-0', kind,
    string.format('%s\n%d\n%s\n%s\n%s', account, seq, epoch, time, body))
  return text
end

-- Answers columns_short when one of columns does not reach to the last slot. It was lost, or cut: to write a row into it
-- would fill what is missing with zeros, and nobody could tell any more.
local function short_of(accounts_key, columns)
  local slots, bad = read('LLEN', accounts_key)
  if bad then return bad end
  for _, key in ipairs(columns) do
    local bytes
    bytes, bad = read('STRLEN', key)
    if bad then return bad end
    if bytes < slots * 8 then return {'columns_short', key} end
  end
  return nil
end

-- So many changes of rows are remembered at least, and twice as many at most. A sweep further behind reads every row.
local changes_kept = 16384

-- How many bytes of changes are noted, or nil and a refusal.
local function changes_noted(changed_key)
  return read('STRLEN', changed_key)
end

-- Whatever writes rows notes their slots, for sweeps that read only what changed: 8 bytes each, after the number of changes
-- that came before those still there. bytes is what changes_noted found. Where nothing is noted, or nothing that makes
-- sense, that number begins by the clock, and so beyond whatever a sweep knows: then every row is read again.
local function note_changes(changed_key, bytes, slots)
  if bytes == 0 or bytes % 8 ~= 0 or bytes >= changes_kept * 16 + 8 then
    local time, kept = redis.call('TIME'), ''
    local before = tonumber(time[1]) * 100000 + math.floor(tonumber(time[2]) / 10)
    if bytes > 0 and bytes % 8 == 0 then
      kept = redis.call('GETRANGE', changed_key, -changes_kept * 8, -1)
      before = struct.unpack('<i8', redis.call('GETRANGE', changed_key, 0, 7)) + (bytes - 8 - #kept) / 8
    end
    kept = struct.pack('<i8', before) .. kept
    redis.call('SET', changed_key, kept)
    bytes = #kept
  end
  redis.call('SETRANGE', changed_key, bytes, slots)
end

-- Where nothing is noted, begin: a sweep that reads every row from now on knows what it has read.
local function begin_changes(changed_key, bytes)
  if bytes == 0 then note_changes(changed_key, bytes, '') end
end

-- Without a note of what changed, every row counts as changed: the numbers go on beyond whatever a sweep knows.
local function forget_changes(changed_key)
  local bytes, bad = read('STRLEN', changed_key)
  if bad or bytes == 0 or bytes % 8 ~= 0 then
    redis.call('DEL', changed_key)
    return
  end
  local before = struct.unpack('<i8', redis.call('GETRANGE', changed_key, 0, 7))
  redis.call('SET', changed_key, struct.pack('<i8', before + bytes / 8))
end
