-- Endpoints whose health flaps: how much each does, and which ones damping holds down.

create table weft.projected_flapping (
    instance          text   primary key,
    penalty_milli     bigint not null,
    charged_at_ms     bigint not null,
    reported          text   not null,
    reported_since_ms bigint not null,
    held_since_ms     bigint,
    held_by           bigint,
    hidden            bigint not null
);
comment on table weft.projected_flapping is
    'Endpoints that got points since they take part. Read status.flapping, which knows how many are left.';

create view status.flapping as
select flapping.instance                                         as endpoint,
       case when flapping.held_since_ms is not null then 'held'
            when settings.enabled and now.penalty > settings.suppress then 'kept'
            else 'watched' end                                   as state,
       round(now.penalty::numeric)::bigint                       as penalty,
       instance.health                                           as published,
       flapping.reported,
       to_timestamp(flapping.held_since_ms / 1000.0)             as suppressed_since,
       flapping.held_by,
       -- A second of grace after its points are down, and five seconds of being up.
       case when flapping.held_since_ms is not null and flapping.reported = 'healthy' then greatest(
           to_timestamp((flapping.reported_since_ms + 5000) / 1000.0),
           to_timestamp((flapping.charged_at_ms + 1000 + settings.half_life_ms
               * greatest(log(2.0, greatest(flapping.penalty_milli, 1) / 1000.0 / settings.reuse), 0)) / 1000.0))
       end                                                       as release_estimate,
       flapping.hidden                                           as hidden_transitions,
       flapping.instance                                         as reporter
from weft.projected_flapping as flapping
join weft.projected_instance as instance using (instance)
-- Where nobody set them, the defaults hold, as in weft-model's damping.rs.
cross join lateral (
    select coalesce((damping.settings ->> 'enabled')::boolean, true)        as enabled,
           coalesce((damping.settings ->> 'half_life_ms')::numeric, 30000)  as half_life_ms,
           coalesce((damping.settings ->> 'suppress')::numeric, 3000)       as suppress,
           coalesce((damping.settings ->> 'reuse')::numeric, 750)           as reuse
    from (values (1)) as one
    left join (select policy.spec -> 'damping' as settings from weft.projected_policy as policy
               where policy.scope = 'mesh') as damping on true) as settings
cross join lateral (
    select flapping.penalty_milli / 1000.0 * power(0.5::double precision, least(greatest(
        extract(epoch from clock_timestamp()) * 1000 - flapping.charged_at_ms, 0)
        / settings.half_life_ms, 60)::double precision) as penalty) as now
where flapping.held_since_ms is not null or now.penalty >= 1;
comment on view status.flapping is
    'Endpoints whose health flaps or did so lately, and what damping does about it. Points are as of this moment.';
comment on column status.flapping.endpoint is '<namespace>/<service>/<instance>';
comment on column status.flapping.state is
    'held: published as unhealthy until it is calm; kept: it would be held if its service did not need it; or watched.';
comment on column status.flapping.penalty is 'Its points: 1000 for each time that it went down, half of them forgotten every half-life.';
comment on column status.flapping.published is 'Its health as the data plane sees it.';
comment on column status.flapping.reported is 'Its health as it was last reported.';
comment on column status.flapping.suppressed_since is 'Since when it is held; null if it is not.';
comment on column status.flapping.held_by is 'The event that brought it over the threshold; null if it is not held.';
comment on column status.flapping.release_estimate is 'When it will be let go if it stays up; null if it is not held, or not up.';
comment on column status.flapping.hidden_transitions is 'Changes of its health since it is held, none of which was published.';
comment on column status.flapping.reporter is 'Whose sidecar reports its health: always its own.';

grant select, insert, update, delete on weft.projected_flapping to weft_projector;
grant select on weft.projected_flapping to weft_reader;
grant select on status.flapping to weft_reader, weft_projector;
