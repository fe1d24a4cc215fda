-- Rollouts: canaries are in classes of their own, and have variants of some shards, whose rows are called `canary/<shard>`.

alter table weft.interest_class add column canary boolean not null default false;
comment on column weft.interest_class.class_id is 'Derived from the other columns.';
comment on column weft.interest_class.canary is 'Its sidecars run the policies of the running rollout; of shards called canary/<shard> they have these.';

-- Not derived from the log: what canaries of the running rollout said that they met with, to whichever controller they talk to.
-- Written by every controller, read by whichever leads. Losing it lets a rollout wait until its canaries said it again.
create table weft.rollout_evidence (
    instance    text        primary key,
    rollout     bigint      not null,
    applied_at  timestamptz,
    error       text,
    connections bigint      check (connections >= 0),
    refused     bigint      check (refused >= 0),
    failed      bigint      check (failed >= 0),
    seen_at     timestamptz not null
);
comment on table weft.rollout_evidence is 'What each canary of the newest rollout met with. Read status.canaries.';
comment on column weft.rollout_evidence.rollout is 'The event that began the rollout.';
comment on column weft.rollout_evidence.applied_at is 'Since when it runs the rollout''s policies; null if it does not.';
comment on column weft.rollout_evidence.error is 'Why it refused to; null if it did not.';
comment on column weft.rollout_evidence.connections is 'Connections that lived then and came since; null if it did not say.';
comment on column weft.rollout_evidence.refused is 'Those of them that it refused.';
comment on column weft.rollout_evidence.failed is 'Those of them that reached nobody.';

create view status.rollout as
select case
           when policy.spec::jsonb ? 'running' then 'running'
           when policy.spec::jsonb ? 'advanced' then 'advanced'
           else 'aborted'
       end                                         as state,
       policy.summary,
       policy.spec,
       policy.position,
       to_timestamp(policy.changed_at_ms / 1000.0) as changed_at,
       policy.actor                                as changed_by
from weft.projected_policy as policy
where policy.kind = 'rollout';
comment on view status.rollout is 'The running rollout, or how the last one ended; no row if there never was one.';
comment on column status.rollout.state is 'running, advanced or aborted.';
comment on column status.rollout.summary is 'What canaries try, or what became of it, in words.';
comment on column status.rollout.spec is 'All of it: policies, canaries and bounds, or what canaries met with.';
comment on column status.rollout.position is 'The event that brought it there.';
comment on column status.rollout.changed_at is 'When that was recorded.';
comment on column status.rollout.changed_by is 'Who caused it.';

create view status.canaries as
select evidence.instance,
       evidence.applied_at,
       evidence.error,
       evidence.connections,
       evidence.refused,
       evidence.failed,
       evidence.seen_at
from weft.rollout_evidence as evidence
join status.rollout as rollout on rollout.state = 'running' and rollout.position = evidence.rollout;
comment on view status.canaries is 'What each canary of the running rollout says that it met with.';
comment on column status.canaries.instance is '<namespace>/<service>/<instance>';
comment on column status.canaries.applied_at is 'Since when it runs the rollout''s policies; null if it does not.';
comment on column status.canaries.error is 'Why it refused to; null if it did not.';
comment on column status.canaries.connections is 'Connections that lived then and came since; null if it did not say.';
comment on column status.canaries.refused is 'Those of them that it refused.';
comment on column status.canaries.failed is 'Those of them that reached nobody.';
comment on column status.canaries.seen_at is 'When it last said so.';

create or replace view status.policies as
select policy.scope,
       policy.kind,
       policy.summary,
       policy.spec,
       policy.version,
       policy.position,
       to_timestamp(policy.changed_at_ms / 1000.0) as changed_at,
       policy.actor                                as changed_by
from weft.projected_policy as policy
where policy.kind <> 'rollout';

grant select on weft.rollout_evidence, status.rollout, status.canaries to weft_reader, weft_projector;
grant insert, update, delete on weft.rollout_evidence to weft_projector;
