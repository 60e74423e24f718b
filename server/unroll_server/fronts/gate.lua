-- Refuses calls in Envoy's own thread while more of them are in flight than can be answered in time; see gate.py,
-- which writes `gate_path`'s file, and gate_filter.py, which puts that name, and `gate_log`, before this.

local ffi = require("ffi")
ffi.cdef [[
int open(const char *path, int flags, ...);
int close(int descriptor);
void *mmap(void *address, size_t length, int protection, int flags, int descriptor, long offset);
]]
local READ_WRITE, SHARED, O_RDWR = 3, 1, 2
local SHARE, FLOOR, FULL, REFUSED = 0, 1, 2, 16
-- From where a method's kind has its numbers.
local PASSED, ENDED, RATE, HORIZON = 0, 1, 2, 3
local CAUSES, DEADLINE = { DEADLINE_TOO_NEAR = 0, QUEUED_STEPS = 1, QUEUED_BYTES = 2 }, 0
local SECONDS = { H = 3600, M = 60, S = 1, m = 1e-3, u = 1e-6, n = 1e-9 }

local numbers, places, refusals

local function open_gate()
  local file = assert(io.open(gate_path, "r"))
  file:seek("set", gate_numbers)
  places, refusals = {}, { [0] = {}, {}, {} }
  for line in file:lines() do
    local place, kind, path = line:match("^method (%d+) (%d+) (%S+)$")
    if place then
      places[path] = { place = tonumber(place), kind = tonumber(kind) }
    else
      local reason, seconds, pushback, details, message = line:match("^refusal (%S+) (%S+) (%S+) (%S+) (.+)$")
      table.insert(refusals[CAUSES[reason]], {
        seconds = tonumber(seconds), pushback = pushback, details = details, message = message,
      })
    end
  end
  file:close()
  local descriptor = ffi.C.open(gate_path, O_RDWR)
  local address = ffi.C.mmap(nil, gate_numbers, READ_WRITE, SHARED, descriptor, 0)
  ffi.C.close(descriptor)
  assert(ffi.cast("intptr_t", address) ~= -1, "the gate can't be mapped")
  numbers = ffi.cast("double *", address)
end

local function seconds_of(timeout)
  if timeout == nil then return nil end
  local digits, unit = timeout:match("^(%d+)([HMSmun])$")
  return digits and tonumber(digits) * SECONDS[unit]
end

-- A name for a call that brings none, as calls.py gives one.
local function new_id()
  local file = assert(io.open("/proc/sys/kernel/random/uuid", "r"))
  local id = file:read("*l"):gsub("-", "")
  file:close()
  return id
end

local function quoted(text) return '"' .. text:gsub('[\\"]', "\\%0") .. '"' end

-- The line in the access log of a call that Python never hears of; see calls.py and process.py.
local function tell(handle, request_id)
  local milliseconds = tonumber(handle:timestamp(EnvoyTimestampResolution.MILLISECOND))
  local now, rest = math.floor(milliseconds / 1000), milliseconds % 1000
  local address = handle:streamInfo():downstreamRemoteAddress()
  local peer = (address:sub(1, 1) == "[" and "ipv6:" or "ipv4:") .. address
  local path = handle:headers():get(":path")
  local line
  if gate_log == "json" then
    line = os.date("!%Y-%m-%dT%H:%M:%S", now) .. string.format(".%03d+00:00", rest)
    line = '{"time": "' .. line .. '", "level": "INFO", "logger": "unroll_server.access", "message": "call", '
      .. '"request_id": ' .. quoted(request_id) .. ', "method": "' .. path .. '", "code": "RESOURCE_EXHAUSTED", '
      .. '"seconds": 0.0, "peer": "' .. peer .. '", "received": 0, "received_bytes": 0, "sent": 0, "sent_bytes": 0, '
      .. '"steps": 0}\n'
  else
    local plain = request_id:find('[="]') and quoted(request_id) or request_id
    line = os.date("%Y-%m-%d %H:%M:%S", now) .. string.format(",%03d", rest)
      .. " INFO unroll_server.access: call request_id=" .. plain .. " method=" .. path
      .. " code=RESOURCE_EXHAUSTED seconds=0.0 peer=" .. peer
      .. " received=0 received_bytes=0 sent=0 sent_bytes=0 steps=0\n"
  end
  io.stderr:write(line)
end

local function refuse(handle, place, cause, seconds, request_id)
  local counter = REFUSED + 3 * place + cause
  numbers[counter] = numbers[counter] + 1
  local chosen
  for _, refusal in ipairs(refusals[cause]) do
    chosen = refusal
    if refusal.seconds >= seconds then break end
  end
  local trailers = {
    [":status"] = "200",
    ["grpc-status"] = "8",
    ["grpc-message"] = chosen.message,
    ["grpc-status-details-bin"] = chosen.details,
    ["grpc-retry-pushback-ms"] = chosen.pushback,
  }
  if not (request_id and #request_id <= 128 and request_id:match("^[!-~]+$")) then
    request_id = gate_log ~= "" and new_id() or nil
  end
  trailers["x-request-id"] = request_id
  if gate_log ~= "" then tell(handle, request_id) end
  handle:respond(trailers, nil)
end

function envoy_on_request(handle)
  if numbers == nil then open_gate() end
  local headers = handle:headers()
  local path = headers:get(":path")
  -- Python is not told of a query that is empty.
  local method = places[path] or places[path:match("^(.*)%?$")]
  if method == nil then return end
  local place, own = method.place, numbers + method.kind
  local flight, rate, horizon = own[PASSED] - own[ENDED], own[RATE], own[HORIZON]
  if horizon == math.huge then
    refuse(handle, place, numbers[FULL], 1, headers:get("x-request-id"))
    return
  end
  local crowded = rate > 0 and flight >= numbers[FLOOR]
  if crowded or horizon > 0 then
    local seconds = seconds_of(headers:get("grpc-timeout"))
    local late = seconds and (seconds < horizon or (crowded and flight > rate * seconds * numbers[SHARE]))
    if late then
      local patience = crowded and math.max(horizon / 4, flight / rate / 2) or horizon / 4
      refuse(handle, place, DEADLINE, patience, headers:get("x-request-id"))
      return
    end
  end
  own[PASSED] = own[PASSED] + 1
end
