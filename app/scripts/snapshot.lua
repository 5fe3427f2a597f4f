-- Put between the guard and the scripts that show an account. It writes nothing.

-- One account as it stands, the operation that may have been booked already, and the marks: a list, or nil and a
-- refusal. From KEYS[first] on come for each of symbols: mark_price, mark, columns quantity, columns cost.
local function account_as_it_is(operation_key, balance_key, positions_key, ledger_key, version_key, halted_key,
  column_balance_key, column_breach_key, first, symbols)
  local known, bad = read('GET', operation_key)
  if bad then return nil, bad end
  if known and not is_operation(known) then return nil, {'wrong_type', operation_key} end
  local version
  version, bad = read('GET', version_key)
  if bad then return nil, bad end
  if not integer_of(version or '0') then return nil, {'wrong_type', version_key} end
  local halted
  halted, bad = read('GET', halted_key)
  if bad then return nil, bad end
  local balance
  balance, bad = read('GET', balance_key)
  if bad then return nil, bad end
  local fields
  fields, bad = read('HGETALL', positions_key)
  if bad then return nil, bad end
  local names = {}
  for i, symbol in ipairs(symbols) do names[i] = 'position:' .. symbol end
  local ledger
  ledger, bad = read('HMGET', ledger_key, 'slot', 'seq', 'breach', 'breach_version', 'breach_at', 'balance',
    unpack(names))
  if bad then return nil, bad end
  local slot = integer_of(ledger[1])
  local function packed(key)
    local row
    if slot then row, bad = read('GETRANGE', key, slot * 8, slot * 8 + 7) else row, bad = '', wrong_type(key, 'string') end
    return row
  end
  local packed_balance = packed(column_balance_key)
  if bad then return nil, bad end
  local packed_breach = packed(column_breach_key)
  if bad then return nil, bad end

  local known_row, marks = {ledger[6] or ''}, {}
  for i in ipairs(symbols) do
    local at = first + 4 * (i - 1)
    local mark
    mark, bad = read('HMGET', KEYS[at + 1], 'price', 'timestamp')
    if bad then return nil, bad end
    if mark[2] and not string.match(mark[2], '^%d+$') then return nil, {'wrong_type', KEYS[at + 1]} end
    local quantity = packed(KEYS[at + 2])
    if bad then return nil, bad end
    local cost = packed(KEYS[at + 3])
    if bad then return nil, bad end
    marks[i] = {read('GET', KEYS[at]) or '', mark[1] or '', mark[2] or '', quantity, cost}
    known_row[i + 1] = ledger[6 + i] or ''
  end
  return {
    known or '', balance or '', fields,
    {ledger[1] or '', ledger[2] or '', ledger[3] or '', ledger[4] or '', ledger[5] or ''},
    version or '0', halted or '', now_us(), packed_balance, packed_breach, marks, known_row,
  }
end
