-- The load that wrk sends: trades, or reads of positions, on random accounts.
--
-- Arguments: kind (trade or positions), prefix of the client ids, accounts, the mark in cents, milliseconds to send
-- for, milliseconds of those that warm up, seed. Prints one line of JSON.
--
-- Every request that was sent is answered: when the time is over a connection asks for a page that does not exist,
-- until wrk stops. So the trades counted here as booked are exactly the rows that must be in Postgres.
local ffi = require('ffi')
ffi.cdef('typedef struct { long s; long ns; } moment; int clock_gettime(int clock, moment *at);')
local at = ffi.new('moment')

local function milliseconds()
  ffi.C.clock_gettime(1, at)
  return tonumber(at.s) * 1000 + tonumber(at.ns) / 1e6
end

local prefix, accounts, mark, send_ms, warm_ms, started
local headers = {['Content-Type'] = 'application/json'}
-- Every second body has its numbers as JSON numbers.
local bodies = {
  '{"account_id":"account-%07d","symbol":"BTC-PERP","side":"%s","quantity":"0.%03d","price":"%.2f",'
    .. '"client_trade_id":"%s-%d"}',
  '{"account_id":"account-%07d","symbol":"BTC-PERP","side":"%s","quantity":0.%03d,"price":%.2f,'
    .. '"client_trade_id":"%s-%d"}',
}

local kinds = {
  trade = {
    status = 201,
    says = '"recorded":true',
    request = function()
      return wrk.format('POST', '/trade', headers, string.format(bodies[sent % 2 + 1],
        math.random(0, accounts - 1), math.random() < 0.5 and 'buy' or 'sell', math.random(1, 999),
        (mark + math.random(-5000, 5000)) / 100, prefix, sent))
    end,
  },
  positions = {
    status = 200,
    says = '"positions":[{',
    request = function()
      return wrk.format('GET', string.format('/positions/account-%07d', math.random(0, accounts - 1)))
    end,
  },
}
local kind

local threads = {}
function setup(thread) threads[#threads + 1] = thread end

sent, good, late, bad, timed, bytes, other = 0, 0, 0, 0, 0, 0, ''

function init(arguments)
  kind, prefix, accounts = kinds[arguments[1]], arguments[2], tonumber(arguments[3])
  mark, send_ms, warm_ms = tonumber(arguments[4]), tonumber(arguments[5]), tonumber(arguments[6])
  math.randomseed(tonumber(arguments[7]))
end

function request()
  local now = milliseconds()
  started = started or now
  if now - started > send_ms then return wrk.format('GET', '/no-such-page') end
  sent = sent + 1
  return kind.request()
end

function response(status, _, answer)
  if status == kind.status and string.find(answer, kind.says, 1, true) then
    good = good + 1
    bytes = bytes + #answer
    local passed = milliseconds() - started
    if passed > warm_ms and passed <= send_ms then timed = timed + 1 end
  elseif status ~= 404 then
    if status == kind.status then late = late + 1 else bad = bad + 1 end
    other = status .. ' ' .. string.sub(answer, 1, 200)
  end
end

function done()
  local of = threads[1]
  io.write(string.format('{"sent":%d,"good":%d,"late":%d,"bad":%d,"timed":%d,"bytes":%d,"other":"%s"}\n',
    of:get('sent'), of:get('good'), of:get('late'), of:get('bad'), of:get('timed'), of:get('bytes'),
    (string.gsub(of:get('other'), '[\\"%c]', "'"))))
end
