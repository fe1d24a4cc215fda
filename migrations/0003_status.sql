-- The stable face of the projection for people. Names and meanings here do not change; the tables behind them may.
-- Every view but status.leader and status.log shows the mesh as of the checkpoint, status.log.projected.

create schema status;
comment on schema status is 'The mesh at a glance. Everything is as of status.log.projected; the log may be further.';

create view status.services as
select service.name                                                              as service,
       service.address,
       (select string_agg(format('%s:%s', listed.port ->> 'name', listed.port ->> 'port'), ', '
                          order by (listed.port ->> 'port')::int)
        from json_array_elements(service.ports) as listed (port))                as ports,
       count(instance.instance)                                                  as instances,
       count(instance.instance) filter (where instance.state = 'ready' and instance.health = 'healthy') as eligible,
       service.version,
       service.position,
       to_timestamp(service.changed_at_ms / 1000.0)                              as changed_at,
       service.actor                                                             as changed_by
from weft.projected_service as service
left join weft.projected_instance as instance on instance.service = service.name
group by service.name;
comment on view status.services is 'Services that exist.';
comment on column status.services.service is '<namespace>/<name>';
comment on column status.services.address is 'The loopback address at which sidecars offer it.';
comment on column status.services.ports is 'name:number of each port.';
comment on column status.services.instances is 'Instances that are ready or draining.';
comment on column status.services.eligible is 'Instances that take new connections: ready and healthy.';
comment on column status.services.version is 'Version of the scope service/<ns>/<name>.';
comment on column status.services.position is 'The event that last changed it.';
comment on column status.services.changed_at is 'When that was recorded.';
comment on column status.services.changed_by is 'Who caused it.';

create view status.endpoints as
select instance.instance,
       instance.service,
       format('%s:%s', case when instance.address like '%:%' then '[' || instance.address || ']'
                            else instance.address end, instance.port) as address,
       instance.state,
       instance.health,
       instance.state = 'ready' and instance.health = 'healthy'       as eligible,
       coalesce(instance.upstreams, '*')                              as upstreams,
       instance.metadata,
       to_timestamp(instance.leaf_not_after_ms / 1000.0)              as leaf_not_after,
       instance.version,
       instance.position,
       to_timestamp(instance.changed_at_ms / 1000.0)                  as changed_at,
       instance.actor                                                 as changed_by
from weft.projected_instance as instance;
comment on view status.endpoints is 'Instances that are ready or draining, and where their sidecars accept mTLS.';
comment on column status.endpoints.instance is '<namespace>/<service>/<instance>';
comment on column status.endpoints.service is 'The service it runs.';
comment on column status.endpoints.address is 'Where its sidecar accepts mTLS.';
comment on column status.endpoints.state is 'ready or draining.';
comment on column status.endpoints.health is 'unknown, healthy or unhealthy, as the data plane sees it.';
comment on column status.endpoints.eligible is 'Whether it takes new connections: ready and healthy.';
comment on column status.endpoints.upstreams is 'The services that it may connect to; * for all.';
comment on column status.endpoints.metadata is 'What its operator wrote down of it.';
comment on column status.endpoints.leaf_not_after is 'When its newest certificate ends; null if none was issued.';
comment on column status.endpoints.version is 'Version of the scope membership/<ns>/<service>/<instance>.';
comment on column status.endpoints.position is 'The event that last changed its membership.';
comment on column status.endpoints.changed_at is 'When that was recorded.';
comment on column status.endpoints.changed_by is 'Who caused it.';

-- Two missed refreshes (10 s each) and some slack: a controller that died cannot say that its sidecars left.
create view status.sidecars as
select wanted.instance,
       format('%s.%s', wanted.epoch, wanted.position)                                   as wanted,
       case when ack.position is not null then format('%s.%s', ack.epoch, ack.position) end as applied,
       case
           when (ack.epoch, ack.position) >= (wanted.epoch, wanted.position) then 0.0
           else round(greatest(extract(epoch from clock_timestamp() - coalesce(
               -- It was put into its class after what it runs: what the class had before is not its delay.
               case when sidecar.since > coalesce(ack.position, 0) then sidecar.assigned_at end,
               (select min(history.produced_at) from weft.manifest_history as history
                where history.class_id = wanted.class_id and history.position > ack.position),
               -- It runs this position in an earlier epoch: the first event of this one is what is new for it.
               greatest(wanted.produced_at,
                        (select event.recorded_at
                         from weft.log_epoch as begun join weft.event on event.position = begun.fork_position + 1
                         where begun.epoch = wanted.epoch)))), 0)::numeric, 3)
       end                                                                              as lag_seconds,
       coalesce(ack.connected and ack.seen_at > clock_timestamp() - interval '25 seconds', false) as connected,
       ack.seen_at                                                                      as last_seen,
       ack.controller,
       ack.took_ms,
       ack.error
from weft.proxy_config_snapshot as wanted
join weft.sidecar_class as sidecar using (instance)
left join weft.sidecar_ack as ack using (instance);
comment on view status.sidecars is 'What every sidecar should run, what it runs, and how long it has been behind.';
comment on column status.sidecars.instance is '<namespace>/<service>/<instance>';
comment on column status.sidecars.wanted is 'The version that it should run, <epoch>.<position>.';
comment on column status.sidecars.applied is 'The version that it said it runs; null if it never said.';
comment on column status.sidecars.lag_seconds is
    'How long there has been something newer for it than what it runs; 0 if there is nothing.';
comment on column status.sidecars.connected is 'Subscribed to a controller now.';
comment on column status.sidecars.last_seen is 'When a controller last heard of it.';
comment on column status.sidecars.controller is 'Which controller that was.';
comment on column status.sidecars.took_ms is 'How long its last swap took, from notice to swap.';
comment on column status.sidecars.error is 'Why it refused its newest snapshot; null if it did not.';

create view status.policies as
select policy.scope,
       policy.kind,
       policy.summary,
       policy.spec,
       policy.version,
       policy.position,
       to_timestamp(policy.changed_at_ms / 1000.0) as changed_at,
       policy.actor                                as changed_by
from weft.projected_policy as policy;
comment on view status.policies is 'Traffic and security policies and the mesh''s defaults, where somebody set them.';
comment on column status.policies.scope is 'The policy''s scope in the log.';
comment on column status.policies.kind is 'traffic, security or mesh.';
comment on column status.policies.summary is 'The policy in words.';
comment on column status.policies.spec is 'The whole policy.';
comment on column status.policies.version is 'Version of the scope.';
comment on column status.policies.position is 'The event that last changed it.';
comment on column status.policies.changed_at is 'When that was recorded.';
comment on column status.policies.changed_by is 'Who caused it.';

create view status.health as
select instance.instance,
       instance.health,
       instance.health_detail                       as detail,
       instance.health_revision                     as revision,
       to_timestamp(instance.health_at_ms / 1000.0) as observed_at
from weft.projected_instance as instance;
comment on view status.health is 'What was last observed of each instance that takes part.';
comment on column status.health.instance is '<namespace>/<service>/<instance>';
comment on column status.health.health is 'unknown, healthy or unhealthy, as the data plane sees it.';
comment on column status.health.detail is 'What was last seen, in the words of its sidecar.';
comment on column status.health.revision is 'Revision of the last observation.';
comment on column status.health.observed_at is 'When the last observation was recorded.';

-- The head is the number of events, because positions have no gaps.
create view status.log as
select coalesce(tail.epoch, 0)             as epoch,
       coalesce(tail.position, 0)          as head,
       tail.recorded_at                    as last_event_at,
       coalesce((select max(epoch) from weft.log_epoch), 0) as open_epoch,
       coalesce(projection.position, 0)    as projected,
       projection.updated_at               as projected_at,
       coalesce(tail.position, 0) - coalesce(projection.position, 0) as projection_lag
from (values (1)) as one
left join lateral (select epoch, position, recorded_at from weft.event order by position desc limit 1) as tail on true
left join weft.projection as projection on projection.name = 'mesh';
comment on view status.log is 'The event log and how far it is folded into the other views.';
comment on column status.log.epoch is 'Epoch of the last event.';
comment on column status.log.head is 'Position of the last event, which is the number of events.';
comment on column status.log.last_event_at is 'When it was recorded.';
comment on column status.log.open_epoch is 'The epoch that the next event will have.';
comment on column status.log.projected is 'The last event that the other views show.';
comment on column status.log.projected_at is 'When the projector last wrote.';
comment on column status.log.projection_lag is 'How many events are not shown yet.';

create view status.leader as
select lease.holder,
       lease.term,
       lease.expires_at > clock_timestamp() as alive,
       lease.expires_at,
       coalesce(projection.position, 0)     as position,
       log.head - coalesce(projection.position, 0) as lag
from weft.lease as lease
left join weft.projection as projection on projection.name = 'mesh'
cross join status.log as log
where lease.name = 'projector';
comment on view status.leader is 'The controller whose projector writes.';
comment on column status.leader.holder is 'Its name.';
comment on column status.leader.term is 'How often the lease has changed hands.';
comment on column status.leader.alive is 'Whether the lease is held now.';
comment on column status.leader.expires_at is 'Until when it is held unless it is renewed.';
comment on column status.leader.position is 'The last event that was projected.';
comment on column status.leader.lag is 'Events that are not projected yet.';

grant usage on schema status to weft_reader;
grant select on all tables in schema status to weft_reader;
