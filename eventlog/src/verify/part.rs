//! One part of the log, checked in itself.

use std::collections::{BTreeMap, VecDeque};
use tokio_postgres::Config;
use weft_model::version::{Epoch, Position, Version};

use super::{ByScope, Contradiction, Defect};
use crate::append::{Begun, COMMANDS_FORMAT, MARK_BYTES, MARKS_FORMAT, earlier_mark, encode_command, mark};
use crate::epoch::decode_hash;
use crate::event::UnixMicros;
use crate::hash::{Encoder, EventHash};
use crate::page::EventView;
use crate::read::copy::Rows;
use crate::read::replay::open_still;
use crate::read::sealed::Segments;
use crate::session::{Session, StoreError};

/// Batches that are read at once.
const BATCHES_AT_ONCE: i64 = 4_096;

/// What each epoch found when it was opened.
pub(super) struct Epochs {
    /// By position: the epochs opened there and the hash that they found.
    forks: BTreeMap<Position, Vec<(Epoch, EventHash)>>,
    /// Every epoch and the position after which it was open.
    opened: BTreeMap<Epoch, Position>,
}

impl Epochs {
    pub(super) fn new(forks: &[(Epoch, Position, EventHash)]) -> Self {
        let mut epochs = Self { forks: BTreeMap::new(), opened: BTreeMap::new() };
        for (epoch, position, hash) in forks {
            epochs.forks.entry(*position).or_default().push((*epoch, *hash));
            epochs.opened.insert(*epoch, *position);
        }
        epochs
    }

    pub(super) fn check(&self, position: Position, hash: EventHash) -> Result<(), Defect> {
        let here = self.forks.get(&position).into_iter().flatten();
        match here.into_iter().find(|(_, found)| *found != hash) {
            Some((epoch, found)) => Err(Defect::Rewritten { epoch: *epoch, found: *found }),
            None => Ok(()),
        }
    }
}

/// The events with `after < position <= to`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) after: Position,
    pub(super) to: Position,
    /// Whether they are sealed, all of them.
    pub(super) sealed: bool,
}

/// A part, as far as nothing is wrong with it.
pub(super) struct Passed {
    /// The stored hash before it; none if there is none, which the part before it tells.
    pub(super) previous: Option<EventHash>,
    pub(super) ends: Option<Ends>,
    pub(super) scopes: ByScope<Seen>,
}

/// Its first and its last event.
#[derive(Clone, Copy)]
pub(super) struct Ends {
    pub(super) first_epoch: Epoch,
    pub(super) first_time: UnixMicros,
    pub(super) position: Position,
    pub(super) hash: EventHash,
    pub(super) epoch: Epoch,
    pub(super) time: UnixMicros,
}

/// A scope's versions in a part.
pub(super) struct Seen {
    pub(super) first: Version,
    /// Where the first is.
    pub(super) at: Position,
    pub(super) last: Version,
}

impl Part {
    /// Checks the part up to its first defect.
    pub(super) async fn check(
        self,
        config: &Config,
        epochs: &Epochs,
    ) -> Result<(Passed, Option<(Position, Defect)>), StoreError> {
        let session = open_still(config).await?;
        let witnesses = Witnesses::new(&session, self);
        let previous = self.previous(&session).await?;
        let mut walk = Walk {
            epochs,
            witnesses,
            hash: previous,
            position: self.after,
            passed: Passed { previous, ends: None, scopes: ByScope::new() },
        };
        let reading = open_still(config).await?;
        let defect = if self.sealed {
            walk.segments(self, &reading).await?
        } else {
            walk.rows(self, &reading).await?
        };
        Ok((walk.passed, defect))
    }

    /// The stored hash of the event before the part.
    async fn previous(&self, session: &Session) -> Result<Option<EventHash>, StoreError> {
        const SQL: &str = "select hash from weft.event where position = $1 union all \
                           select last_hash from weft.log_segment where last_position = $1 limit 1";
        if self.after == Position::ZERO {
            return Ok(Some(EventHash::GENESIS));
        }
        let row = session.client.query_opt(SQL, &[&self.after.0.cast_signed()]).await;
        let row = row.map_err(StoreError::while_doing("read the event before a part"))?;
        row.map(|row| decode_hash(row.get(0))).transpose()
    }
}

/// What holds after the events seen so far.
struct Walk<'a> {
    epochs: &'a Epochs,
    witnesses: Witnesses<'a>,
    position: Position,
    /// Hash of the event at `position`, where it is known.
    hash: Option<EventHash>,
    passed: Passed,
}

type Found = Result<Option<(Position, Defect)>, StoreError>;

impl Walk<'_> {
    async fn rows(&mut self, part: Part, session: &Session) -> Found {
        let mut rows = Rows::open(session, part.after, part.to).await?;
        while let Some((page, beside)) = rows.next().await? {
            for (event, beside) in page.events().zip(&beside) {
                if let Some(next) = self.gap(&event) {
                    return Ok(Some(next));
                }
                let computed = self.hash.map(|previous| event.chain(previous));
                if let Some(computed) = computed.filter(|computed| *computed != beside.hash) {
                    let defect = Defect::Hash { recorded: beside.hash, computed };
                    return Ok(Some((event.position, defect)));
                }
                if beside.torn {
                    return Ok(Some((event.position, Defect::Witness(Contradiction::Mark))));
                }
                let stepped = self.step(&event, beside.hash);
                let witnessed = self.witnesses.check(&event, beside.hash, Some(beside.command())).await?;
                if let Err(defect) = stepped.and(witnessed.map_err(Defect::Witness)) {
                    return Ok(Some((event.position, defect)));
                }
            }
        }
        Ok(self.end(part))
    }

    async fn segments(&mut self, part: Part, session: &Session) -> Found {
        let mut segments = Segments::open(session, part.after, part.to).await?;
        while let Some(segment) = segments.next().await? {
            if segment.first != self.position.next() {
                return Ok(Some((self.position.next(), Defect::Missing { next: segment.first })));
            }
            let page = match segment.open() {
                Ok(page) => page,
                Err(error) => return Ok(Some((segment.first, Defect::Segment(error)))),
            };
            let mut hash = segment.previous_hash;
            if let Some(recorded) = self.hash.filter(|recorded| *recorded != hash) {
                return Ok(Some((segment.first, Defect::Hash { recorded, computed: hash })));
            }
            for event in page.events() {
                if let Some(next) = self.gap(&event) {
                    return Ok(Some(next));
                }
                hash = event.chain(hash);
                let stepped = self.step(&event, hash);
                let witnessed = self.witnesses.check(&event, hash, None).await?;
                if let Err(defect) = stepped.and(witnessed.map_err(Defect::Witness)) {
                    return Ok(Some((event.position, defect)));
                }
            }
            if hash != segment.last_hash {
                let defect = Defect::Hash { recorded: segment.last_hash, computed: hash };
                return Ok(Some((segment.last, defect)));
            }
        }
        Ok(self.end(part))
    }

    fn gap(&self, event: &EventView<'_>) -> Option<(Position, Defect)> {
        let expected = self.position.next();
        (event.position != expected).then_some((expected, Defect::Missing { next: event.position }))
    }

    fn end(&self, part: Part) -> Option<(Position, Defect)> {
        let next = part.to.next();
        (self.position != part.to).then_some((self.position.next(), Defect::Missing { next }))
    }

    fn step(&mut self, event: &EventView<'_>, hash: EventHash) -> Result<(), Defect> {
        self.version(event)?;
        let before = self.passed.ends;
        let open = self.epochs.opened.get(&event.epoch).is_some_and(|opened| *opened < event.position);
        if !open || before.is_some_and(|before| event.epoch < before.epoch) {
            return Err(Defect::Epoch { recorded: event.epoch });
        }
        if let Some(before) = before.filter(|before| event.recorded_at < before.time) {
            return Err(Defect::Time { recorded: event.recorded_at, previous: before.time });
        }
        self.epochs.check(event.position, hash)?;
        let (first_epoch, first_time) =
            before.map_or((event.epoch, event.recorded_at), |before| (before.first_epoch, before.first_time));
        let (position, epoch, time) = (event.position, event.epoch, event.recorded_at);
        self.passed.ends = Some(Ends { first_epoch, first_time, position, hash, epoch, time });
        self.position = position;
        self.hash = Some(hash);
        Ok(())
    }

    fn version(&mut self, event: &EventView<'_>) -> Result<(), Defect> {
        let Some(seen) = self.passed.scopes.get_mut(event.scope) else {
            let seen = Seen { first: event.version, at: event.position, last: event.version };
            self.passed.scopes.insert(event.scope.into(), seen);
            return Ok(());
        };
        let expected = seen.last.next();
        if event.version != expected {
            return Err(Defect::Version { scope: event.scope.to_owned(), expected, recorded: event.version });
        }
        seen.last = event.version;
        Ok(())
    }
}

/// A row of `weft.log_batch`.
struct Batch {
    first: Position,
    last: Position,
    epoch: Epoch,
    recorded_at: UnixMicros,
    hash: EventHash,
    commands_hash: EventHash,
    marks_format: i16,
    marks: Vec<u8>,
}

impl Batch {
    /// What it must remember of an event.
    fn mark(&self, hash: &EventHash, command: Option<Begun<'_>>) -> [u8; MARK_BYTES] {
        if self.marks_format == MARKS_FORMAT { mark(hash, command) } else { earlier_mark(hash, command) }
    }
}

/// The batches of a part, in order, read as they are needed.
struct Witnesses<'a> {
    session: &'a Session,
    to: Position,
    ahead: VecDeque<Batch>,
    /// The last batch that was read.
    read_to: Position,
    /// Where the batch before the current one ends; none before the first.
    before: Option<Position>,
    current: Option<(Batch, Encoder, bool)>,
}

impl<'a> Witnesses<'a> {
    fn new(session: &'a Session, part: Part) -> Self {
        let (ahead, read_to) = (VecDeque::new(), part.after);
        Self { session, to: part.to, ahead, read_to, before: None, current: None }
    }

    /// Checks an event against its batch. `beside` is the command that begins with it, where that is still known.
    async fn check(
        &mut self,
        event: &EventView<'_>,
        hash: EventHash,
        beside: Option<Option<Begun<'_>>>,
    ) -> Result<Result<(), Contradiction>, StoreError> {
        let passed = self.current.as_ref().is_none_or(|(batch, ..)| batch.last < event.position);
        if passed && !self.advance(event.position).await? {
            return Ok(Err(Contradiction::Order));
        }
        Ok(self.compare(event, hash, beside))
    }

    /// Goes to the batch that should hold the position. False if the one that is next does not follow the last.
    async fn advance(&mut self, position: Position) -> Result<bool, StoreError> {
        if let Some((batch, ..)) = self.current.take() {
            self.before = Some(batch.last);
        }
        if self.ahead.is_empty() {
            self.ahead = read(self.session, self.read_to, self.to).await?.into();
            self.read_to = self.ahead.back().map_or(self.read_to, |batch| batch.last);
        }
        let Some(batch) = self.ahead.pop_front() else { return Ok(true) };
        let follows = self.before.is_none_or(|before| batch.first == before.next());
        // A batch of which only the end lies here is known in part only.
        let whole = batch.first >= position;
        self.current = Some((batch, Encoder::new(COMMANDS_FORMAT), whole));
        Ok(follows)
    }

    fn compare(
        &mut self,
        event: &EventView<'_>,
        hash: EventHash,
        beside: Option<Option<Begun<'_>>>,
    ) -> Result<(), Contradiction> {
        let Some((batch, commands, whole)) = &mut self.current else { return Err(Contradiction::Missing) };
        if !(batch.first..=batch.last).contains(&event.position) {
            return Err(Contradiction::Missing);
        }
        if (batch.epoch, batch.recorded_at) != (event.epoch, event.recorded_at) {
            return Err(Contradiction::Time);
        }
        let at = usize::try_from(event.position.0 - batch.first.0)
            .unwrap_or(usize::MAX)
            .saturating_mul(MARK_BYTES);
        let remembered = batch.marks.get(at..at.saturating_add(MARK_BYTES)).ok_or(Contradiction::Mark)?;
        let same = match beside {
            Some(command) => remembered == batch.mark(&hash, command).as_slice(),
            // What is sealed keeps no fingerprints, and whether one was combined into the mark is not known any more. The
            // hash at the batch's end tells the rest.
            None => true,
        };
        if !same {
            return Err(Contradiction::Mark);
        }
        if let Some(Some((fingerprint, events))) = beside {
            encode_command(commands, event.command_id.as_bytes(), event.position, events, fingerprint);
        }
        if event.position == batch.last {
            if batch.hash != hash {
                return Err(Contradiction::Hash);
            }
            if *whole && beside.is_some() && EventHash(commands.clone().finish()) != batch.commands_hash {
                return Err(Contradiction::Commands);
            }
        }
        Ok(())
    }
}

async fn read(session: &Session, after: Position, to: Position) -> Result<Vec<Batch>, StoreError> {
    const SQL: &str = "select first_position, last_position, epoch, recorded_at, hash, commands_hash, marks, \
         marks_format from weft.log_batch where last_position > $1 and first_position <= $2 order by last_position limit $3";
    let (after, to) = (after.0.cast_signed(), to.0.cast_signed());
    let rows = session.client.query(SQL, &[&after, &to, &BATCHES_AT_ONCE]).await;
    let rows = rows.map_err(StoreError::while_doing("read batches"))?;
    let batch = |row: &tokio_postgres::Row| {
        Ok(Batch {
            first: Position(row.get::<_, i64>(0).cast_unsigned()),
            last: Position(row.get::<_, i64>(1).cast_unsigned()),
            epoch: Epoch(row.get::<_, i64>(2).cast_unsigned()),
            recorded_at: UnixMicros::from_database(row.try_get(3).map_err(|_| undecodable())?),
            hash: decode_hash(row.get(4))?,
            commands_hash: decode_hash(row.get(5))?,
            marks: row.get(6),
            marks_format: row.get(7),
        })
    };
    rows.iter().map(batch).collect()
}

const fn undecodable() -> StoreError {
    StoreError::Undecodable { table: "weft.log_batch", column: "recorded_at" }
}
