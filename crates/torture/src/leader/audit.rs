//! Who wrote what, as the database saw it: triggers note every move of the checkpoint and every write to the rows beside it, with
//! the login that did it. Each controller has a login of its own. Nothing here asks or trusts a controller.
//!
//! The checkpoint's row is locked from its change to the end of the transaction, so the order of its notes is the order of
//! the commits; what was rolled back left no note.

use std::collections::{BTreeMap, BTreeSet};

use crate::phase::Findings;
use crate::server::Session;

/// What is written without the fence, by every controller for itself, and is no part of what the log folds to: the lease, what sidecars
/// say and how far they are, and the fold's checkpoints, which are checked when they are read. Any other table that a
/// projector may write is fenced, also one that is new.
const UNFENCED: &str =
    "'lease', 'projection', 'sidecar_ack', 'class_ack', 'controller', 'propagation', 'fold_checkpoint'";

/// A change of the checkpoint's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Note {
    transaction: String,
    login: String,
    terms: (i64, i64),
    positions: (i64, i64),
}

/// Puts the triggers there. `logins` are those of the controllers.
pub(super) async fn begin(session: &Session) -> anyhow::Result<()> {
    let setup = format!(
        "create schema torture;
         create table torture.note (id bigserial primary key, transaction xid8 not null default pg_current_xact_id(), \
             login text not null, old_term bigint not null, new_term bigint not null, \
             old_position bigint not null, new_position bigint not null);
         create table torture.write (transaction xid8, login text, relation text, \
             primary key (transaction, login, relation));
         create function torture.note() returns trigger language plpgsql security definer as $$ begin
             insert into torture.note (login, old_term, new_term, old_position, new_position) values
                 (session_user, coalesce(old.term, 0), new.term, coalesce(old.position, 0), new.position);
             return null;
         end $$;
         create function torture.write() returns trigger language plpgsql security definer as $$ begin
             insert into torture.write values (pg_current_xact_id(), session_user, tg_relid::regclass::text)
             on conflict do nothing;
             return null;
         end $$;
         create trigger torture after insert or update on weft.projection \
             for each row execute function torture.note();
         do $$ declare fenced regclass; begin
             for fenced in select oid from pg_class where relnamespace = 'weft'::regnamespace and relkind = 'r'
                 and has_table_privilege('weft_projector', oid, 'insert') and relname not in ({UNFENCED})
             loop
                 execute format('create trigger torture after insert or update or delete on %s \
                     for each statement execute function torture.write()', fenced);
             end loop;
         end $$;"
    );
    Ok(session.client.batch_execute(&setup).await?)
}

/// Who took the highest term; none if nobody has.
pub(super) async fn leader(session: &Session) -> anyhow::Result<Option<(i64, String)>> {
    const SQL: &str =
        "select new_term, login from torture.note where new_term > old_term order by id desc limit 1";
    let row = session.client.query_opt(SQL, &[]).await?;
    Ok(row.map(|row| (row.get(0), row.get(1))))
}

/// Everything that was noted, judged.
pub(super) async fn judge(session: &Session, findings: &mut Findings) -> anyhow::Result<()> {
    const NOTES: &str = "select transaction::text, login, old_term, new_term, old_position, new_position \
                         from torture.note order by id";
    const WRITES: &str = "select transaction::text, login, relation from torture.write";
    let notes: Vec<Note> = session
        .client
        .query(NOTES, &[])
        .await?
        .iter()
        .map(|row| Note {
            transaction: row.get(0),
            login: row.get(1),
            terms: (row.get(2), row.get(3)),
            positions: (row.get(4), row.get(5)),
        })
        .collect();
    let complaints = disorder(&notes);
    *findings.done.entry("writes under an old term".to_owned()).or_default() += complaints.len() as u64;
    findings.complaints.extend(complaints);

    let fenced: BTreeSet<(&str, &str)> =
        notes.iter().map(|note| (note.transaction.as_str(), note.login.as_str())).collect();
    let writes = session.client.query(WRITES, &[]).await?;
    let mut unfenced: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for write in &writes {
        let (transaction, login, relation): (&str, &str, &str) = (write.get(0), write.get(1), write.get(2));
        if !fenced.contains(&(transaction, login)) {
            *unfenced.entry((login, relation)).or_default() += 1;
        }
    }
    for ((login, relation), times) in unfenced {
        findings.complain(format!("{login} wrote {relation} {times} times without the checkpoint"));
    }
    let moves = notes.iter().filter(|note| note.terms.0 == note.terms.1).count();
    findings.done.insert("terms".to_owned(), (notes.len() - moves) as u64);
    findings.done.insert("checkpoints".to_owned(), moves as u64);
    if moves == 0 || writes.is_empty() {
        findings.complain("nothing was noted, so nothing is proved");
    }
    Ok(())
}

/// What is wrong with the order: somebody wrote who had not taken the newest term, or a term or the checkpoint went back.
fn disorder(notes: &[Note]) -> Vec<String> {
    let mut wrong = Vec::new();
    let (mut term, mut position, mut owner) = (0, 0, "");
    for note in notes {
        let (old, new) = note.terms;
        if old != term || note.positions.0 != position {
            wrong.push(format!("{note:?} does not follow term {term} at {position}"));
        }
        if new > old {
            owner = &note.login;
        } else if new < old || note.login != owner {
            wrong.push(format!("{note:?}, but {owner} had taken term {term}"));
        }
        if note.positions.1 < note.positions.0 {
            wrong.push(format!("{note:?} takes the checkpoint back"));
        }
        (term, position) = (new, note.positions.1);
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(login: &str, terms: (i64, i64), positions: (i64, i64)) -> Note {
        Note { transaction: String::new(), login: login.to_owned(), terms, positions }
    }

    #[test]
    fn who_took_the_newest_term_writes_and_nobody_else() {
        let take_a = note("a", (0, 1), (0, 0));
        let take_b = note("b", (1, 2), (5, 5));
        let good = [take_a.clone(), note("a", (1, 1), (0, 5)), take_b.clone(), note("b", (2, 2), (5, 9))];
        assert!(disorder(&good).is_empty());
        let paused = [take_a.clone(), note("a", (1, 1), (0, 5)), take_b, note("a", (2, 2), (5, 9))];
        assert_eq!(disorder(&paused).len(), 1);
        for bad in [note("a", (1, 1), (0, -1)), note("a", (1, 0), (0, 1)), note("a", (1, 1), (3, 4))] {
            assert_eq!(disorder(&[take_a.clone(), bad.clone()]).len(), 1, "{bad:?}");
        }
    }
}
