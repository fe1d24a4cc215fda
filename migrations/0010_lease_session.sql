-- A leader that was killed is replaced at once: the lease says which database session it was taken with, and whoever wants it
-- looks whether that session is still there. This is about liveness only; what a former leader writes is refused by its term.

alter table weft.lease
    add column session_pid  integer,
    add column session_term bigint;
comment on column weft.lease.session_pid is 'The server process of the session that the lease was taken or last renewed with.';
comment on column weft.lease.session_term is 'The term that session_pid is of. Differs from term if a version that writes no session took the lease.';

-- False as long as it cannot be told: then the lease ends with its time. A number that another session of the same kind uses
-- meanwhile has the same effect.
create function weft.lease_session_ended(lease weft.lease) returns boolean
    language sql stable
    set search_path = pg_catalog
    return lease.session_pid is not null
       and lease.session_term = lease.term
       and not exists (
           select from pg_stat_get_activity(lease.session_pid) as session
           where session.application_name = 'weft-lease');
comment on function weft.lease_session_ended(weft.lease) is 'Whether the database session of the lease''s holder has ended.';
revoke all on function weft.lease_session_ended(weft.lease) from public;
grant execute on function weft.lease_session_ended(weft.lease) to weft_projector;
