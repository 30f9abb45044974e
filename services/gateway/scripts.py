"""The Lua scripts that change history in one piece. KEYS[1] is the prefix of every key.

index: sorted set of ids, scored by themselves; next: the counter; sizes: hash of an entry's bytes; bytes: their sum;
entry:<id>, image:<id>, thumb:<id>: JSON, PNG, thumbnail; done:<token>: the id that a write was given, for a while.
"""

TOKEN_SECONDS = 600

_DROP = """
local function drop(p, id)
  redis.call('UNLINK', p..'entry:'..id, p..'image:'..id, p..'thumb:'..id)
  redis.call('ZREM', p..'index', id)
  redis.call('DECRBY', p..'bytes', redis.call('HGET', p..'sizes', id) or 0)
  redis.call('HDEL', p..'sizes', id)
end
"""

ADD = (
    _DROP
    + f"""
local p, token = KEYS[1], KEYS[1]..'done:'..ARGV[4]
local known = redis.call('GET', token)
if known then return tonumber(known) end
local id = redis.call('INCR', p..'next') - 1
local size = #ARGV[1] + #ARGV[2] + #ARGV[3]
redis.call('MSET', p..'entry:'..id, ARGV[1], p..'image:'..id, ARGV[2], p..'thumb:'..id, ARGV[3])
redis.call('HSET', p..'sizes', id, size)
redis.call('INCRBY', p..'bytes', size)
redis.call('ZADD', p..'index', id, id)
redis.call('SET', token, id, 'EX', {TOKEN_SECONDS})
while redis.call('ZCARD', p..'index') > 1 and (redis.call('ZCARD', p..'index') > tonumber(ARGV[5])
    or tonumber(redis.call('GET', p..'bytes')) > tonumber(ARGV[6])) do
  drop(p, redis.call('ZRANGE', p..'index', 0, 0)[1])
end
return id
"""
)

DELETE = (
    _DROP
    + """
local p, index = KEYS[1], tonumber(ARGV[1])
local id = redis.call('ZRANGE', p..'index', index, index)[1]
if not id or (ARGV[2] ~= '' and id ~= ARGV[2]) then return nil end
local entry = redis.call('GET', p..'entry:'..id)
drop(p, id)
return {id, entry, redis.call('ZCARD', p..'index')}
"""
)

CLEAR = (
    _DROP
    + """
local p = KEYS[1]
local ids = redis.call('ZRANGE', p..'index', 0, -1)
for _, id in ipairs(ids) do drop(p, id) end
return #ids
"""
)
