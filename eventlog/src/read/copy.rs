//! Rows in bulk, by binary COPY: half the server's work of a query, and nothing to allocate per event here.
//!
//! The format is PostgreSQL's own (COPY, "Binary Format"): after a header, each row is its number of fields, then for each
//! field its length, or -1 for null, and its bytes. The server sends a row per message.

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use std::pin::Pin;
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use crate::append::Begun;
use crate::event::UnixMicros;
use crate::hash::EventHash;
use crate::page::{Entry, Page, Span};
use crate::session::{Session, StoreError, within};

use super::{PAGE_BYTES_MAX, PAGE_EVENTS_MAX, REPLAY_SILENCE_MAX};

/// What every row begins with.
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
/// PostgreSQL counts time from the first of January 2000.
const EPOCH_2000_MICROS: i64 = 946_684_800_000_000;
const FIELDS: u16 = 15;

/// What is beside an event for its verification.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    pub(crate) hash: EventHash,
    /// The fingerprint of the command that begins with the event, and the number of its events.
    command: Option<([u8; 32], u32)>,
    /// Only one of the two was there, which the table forbids.
    pub(crate) torn: bool,
}

impl Beside {
    pub(crate) fn command(&self) -> Option<Begun<'_>> {
        self.command.as_ref().map(|(fingerprint, events)| (fingerprint, *events))
    }
}

/// Rows of `weft.event`, page by page.
pub(crate) struct Rows {
    rows: Pin<Box<dyn Stream<Item = Result<Bytes, tokio_postgres::Error>> + Send>>,
    begun: bool,
    ended: bool,
}

impl Rows {
    /// Those with `after < position <= to`, in order.
    pub(crate) async fn open(session: &Session, after: Position, to: Position) -> Result<Self, StoreError> {
        let sql = format!(
            "copy (select position, epoch, version, recorded_at, cause, command_id, schema, scope, type, actor, reason, \
             payload, hash, fingerprint, command_events from weft.event where position > {after} and position <= {to} \
             order by position) to stdout (format binary)"
        );
        let rows = within(REPLAY_SILENCE_MAX, session.client.copy_out(&sql)).await?;
        let rows = rows.map_err(StoreError::while_doing("read events"))?;
        Ok(Self { rows: Box::pin(rows), begun: false, ended: false })
    }

    /// The next page with what is beside its events; none at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<(Page, Vec<Beside>)>, StoreError> {
        within(REPLAY_SILENCE_MAX, self.read_page()).await?
    }

    async fn read_page(&mut self) -> Result<Option<(Page, Vec<Beside>)>, StoreError> {
        let mut page = Builder::default();
        while !self.ended && page.entries.len() < PAGE_EVENTS_MAX && page.text.len() < PAGE_BYTES_MAX {
            let Some(message) = self.rows.next().await else {
                self.ended = true;
                break;
            };
            let mut message = message.map_err(StoreError::while_doing("read events"))?;
            if !self.begun {
                skip_header(&mut message)?;
                self.begun = true;
            }
            while message.has_remaining() {
                if message.remaining() == 2 && message.chunk() == (-1_i16).to_be_bytes() {
                    break;
                }
                page.row(&mut message)?;
            }
        }
        let page = (!page.entries.is_empty()).then(|| (Page::new(page.text, page.entries), page.beside));
        Ok(page)
    }
}

fn skip_header(message: &mut Bytes) -> Result<(), StoreError> {
    let torn = undecodable("copy");
    if !message.starts_with(SIGNATURE) || message.len() < SIGNATURE.len() + 8 {
        return Err(torn);
    }
    message.advance(SIGNATURE.len() + 4);
    let extension = message.get_u32() as usize;
    if message.len() < extension {
        return Err(torn);
    }
    message.advance(extension);
    Ok(())
}

#[derive(Default)]
struct Builder {
    text: String,
    entries: Vec<Entry>,
    beside: Vec<Beside>,
}

impl Builder {
    fn row(&mut self, row: &mut Bytes) -> Result<(), StoreError> {
        if row.remaining() < 2 || row.get_u16() != FIELDS {
            return Err(undecodable("copy"));
        }
        let position = Position(counter(row, "position")?);
        let epoch = Epoch(counter(row, "epoch")?);
        let version = Version(counter(row, "version")?);
        let recorded_at = number(row, "recorded_at")?.checked_add(EPOCH_2000_MICROS);
        let recorded_at = UnixMicros(recorded_at.ok_or(undecodable("recorded_at"))?);
        let cause = match field(row, "cause")? {
            None => None,
            Some(bytes) => Some(Position(u64::from_be_bytes(fixed(&bytes, "cause")?))),
        };
        let command_id = Uuid::from_bytes(fixed(&required(row, "command_id")?, "command_id")?);
        let schema = u16::from_be_bytes(fixed(&required(row, "schema")?, "schema")?);
        let entry = Entry {
            position,
            epoch,
            version,
            schema,
            cause,
            command_id,
            recorded_at,
            scope: self.text(&required(row, "scope")?, "scope")?,
            event_type: self.text(&required(row, "type")?, "type")?,
            actor: self.text(&required(row, "actor")?, "actor")?,
            reason: field(row, "reason")?.map(|reason| self.text(&reason, "reason")).transpose()?,
            payload: self.text(&required(row, "payload")?, "payload")?,
        };
        let hash = EventHash(fixed(&required(row, "hash")?, "hash")?);
        let fingerprint = field(row, "fingerprint")?;
        let events = field(row, "command_events")?;
        let torn = fingerprint.is_some() != events.is_some();
        let command = match (fingerprint, events) {
            (Some(fingerprint), Some(events)) => Some((
                fixed(&fingerprint, "fingerprint")?,
                u32::from_be_bytes(fixed(&events, "command_events")?),
            )),
            _ => None,
        };
        self.entries.push(entry);
        self.beside.push(Beside { hash, command, torn });
        Ok(())
    }

    fn text(&mut self, bytes: &[u8], column: &'static str) -> Result<Span, StoreError> {
        let text = std::str::from_utf8(bytes).map_err(|_| undecodable(column))?;
        let end = |text: &String| u32::try_from(text.len()).map_err(|_| undecodable(column));
        let start = end(&self.text)?;
        self.text.push_str(text);
        Ok(start..end(&self.text)?)
    }
}

/// The next field; none if it is null.
fn field(row: &mut Bytes, column: &'static str) -> Result<Option<Bytes>, StoreError> {
    if row.remaining() < 4 {
        return Err(undecodable(column));
    }
    match usize::try_from(row.get_i32()) {
        Err(_) => Ok(None),
        Ok(length) if length <= row.remaining() => Ok(Some(row.split_to(length))),
        Ok(_) => Err(undecodable(column)),
    }
}

fn required(row: &mut Bytes, column: &'static str) -> Result<Bytes, StoreError> {
    field(row, column)?.ok_or(undecodable(column))
}

fn fixed<const N: usize>(bytes: &[u8], column: &'static str) -> Result<[u8; N], StoreError> {
    bytes.try_into().map_err(|_| undecodable(column))
}

fn number(row: &mut Bytes, column: &'static str) -> Result<i64, StoreError> {
    Ok(i64::from_be_bytes(fixed(&required(row, column)?, column)?))
}

/// A counter is never negative.
fn counter(row: &mut Bytes, column: &'static str) -> Result<u64, StoreError> {
    u64::try_from(number(row, column)?).map_err(|_| undecodable(column))
}

const fn undecodable(column: &'static str) -> StoreError {
    StoreError::Undecodable { table: "weft.event", column }
}
