//! Rows in bulk, by binary COPY: half the server's work of a query, and nothing to allocate per event here.
//!
//! The format is PostgreSQL's own (COPY, "Binary Format"): after a header, each row is its number of fields, then for each
//! field its length, or -1 for null, and its bytes. The server sends a row per message.

use bytes::Bytes;
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
            let message = message.map_err(StoreError::while_doing("read events"))?;
            let mut fields = Fields(&message);
            if !self.begun {
                fields.header()?;
                self.begun = true;
            }
            while !fields.at_end() {
                page.row(&mut fields)?;
            }
        }
        let page = (!page.entries.is_empty()).then(|| (Page::new(page.text, page.entries), page.beside));
        Ok(page)
    }
}

/// What is left of a message.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn header(&mut self) -> Result<(), StoreError> {
        let signature = self.take(SIGNATURE.len(), "copy")?;
        // Flags, of which none that matters is defined.
        self.take(4, "copy")?;
        let extension = u32::from_be_bytes(fixed(self.take(4, "copy")?, "copy")?);
        self.take(usize::try_from(extension).unwrap_or(usize::MAX), "copy")?;
        if signature == SIGNATURE { Ok(()) } else { Err(undecodable("copy")) }
    }

    /// Whether no row is left; the last message says so with a number of fields of its own.
    fn at_end(&self) -> bool {
        self.0.is_empty() || self.0 == (-1_i16).to_be_bytes()
    }

    fn take(&mut self, length: usize, column: &'static str) -> Result<&'a [u8], StoreError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(undecodable(column))?;
        self.0 = rest;
        Ok(taken)
    }

    /// The next field; none if it is null.
    fn optional(&mut self, column: &'static str) -> Result<Option<&'a [u8]>, StoreError> {
        let length = i32::from_be_bytes(fixed(self.take(4, column)?, column)?);
        match usize::try_from(length) {
            Ok(length) => self.take(length, column).map(Some),
            Err(_) => Ok(None),
        }
    }

    fn required(&mut self, column: &'static str) -> Result<&'a [u8], StoreError> {
        self.optional(column)?.ok_or(undecodable(column))
    }

    fn number(&mut self, column: &'static str) -> Result<i64, StoreError> {
        Ok(i64::from_be_bytes(fixed(self.required(column)?, column)?))
    }

    /// A counter is never negative.
    fn counter(&mut self, column: &'static str) -> Result<u64, StoreError> {
        u64::try_from(self.number(column)?).map_err(|_| undecodable(column))
    }
}

#[derive(Default)]
struct Builder {
    text: String,
    entries: Vec<Entry>,
    beside: Vec<Beside>,
}

impl Builder {
    fn row(&mut self, row: &mut Fields<'_>) -> Result<(), StoreError> {
        if row.take(2, "copy")? != FIELDS.to_be_bytes() {
            return Err(undecodable("copy"));
        }
        let position = Position(row.counter("position")?);
        let epoch = Epoch(row.counter("epoch")?);
        let version = Version(row.counter("version")?);
        let recorded_at = row.number("recorded_at")?.checked_add(EPOCH_2000_MICROS);
        let recorded_at = UnixMicros(recorded_at.ok_or(undecodable("recorded_at"))?);
        let cause = match row.optional("cause")? {
            None => None,
            Some(bytes) => Some(Position(u64::from_be_bytes(fixed(bytes, "cause")?))),
        };
        let command_id = Uuid::from_bytes(fixed(row.required("command_id")?, "command_id")?);
        let schema = u16::from_be_bytes(fixed(row.required("schema")?, "schema")?);
        let entry = Entry {
            position,
            epoch,
            version,
            schema,
            cause,
            command_id,
            recorded_at,
            scope: self.text(row.required("scope")?, "scope")?,
            event_type: self.text(row.required("type")?, "type")?,
            actor: self.text(row.required("actor")?, "actor")?,
            reason: row.optional("reason")?.map(|reason| self.text(reason, "reason")).transpose()?,
            payload: self.text(row.required("payload")?, "payload")?,
        };
        let hash = EventHash(fixed(row.required("hash")?, "hash")?);
        let fingerprint = row.optional("fingerprint")?;
        let events = row.optional("command_events")?;
        let torn = fingerprint.is_some() != events.is_some();
        let command = match (fingerprint, events) {
            (Some(fingerprint), Some(events)) => Some((
                fixed(fingerprint, "fingerprint")?,
                u32::from_be_bytes(fixed(events, "command_events")?),
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

fn fixed<const N: usize>(bytes: &[u8], column: &'static str) -> Result<[u8; N], StoreError> {
    bytes.try_into().map_err(|_| undecodable(column))
}

const fn undecodable(column: &'static str) -> StoreError {
    StoreError::Undecodable { table: "weft.event", column }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(fields: &[Option<&[u8]>]) -> Vec<u8> {
        let mut row = u16::try_from(fields.len()).unwrap().to_be_bytes().to_vec();
        for field in fields {
            let length = field.map_or(-1, |field| i32::try_from(field.len()).unwrap());
            row.extend(length.to_be_bytes());
            row.extend(field.unwrap_or_default());
        }
        row
    }

    fn sound() -> Vec<Option<&'static [u8]>> {
        let eight = |bytes: &'static [u8; 8]| Some(&bytes[..]);
        vec![
            eight(b"\0\0\0\0\0\0\0\x07"),
            eight(b"\0\0\0\0\0\0\0\x02"),
            eight(b"\0\0\0\0\0\0\0\x03"),
            eight(b"\0\0\0\0\0\0\0\x01"),
            None,
            Some(&[1; 16]),
            Some(b"\0\x01"),
            Some(b"scope"),
            Some(b"Happened"),
            Some(b"actor"),
            None,
            Some("\"ü\"".as_bytes()),
            Some(&[2; 32]),
            Some(&[3; 32]),
            Some(b"\0\0\0\x01"),
        ]
    }

    fn read(fields: &[Option<&[u8]>]) -> Result<Page, StoreError> {
        let mut builder = Builder::default();
        builder.row(&mut Fields(&row(fields)))?;
        Ok(Page::new(builder.text, builder.entries))
    }

    #[test]
    fn a_row_is_read_field_by_field() {
        let page = read(&sound()).unwrap();
        let event = page.events().next().unwrap();
        assert_eq!((event.position, event.epoch, event.version), (Position(7), Epoch(2), Version(3)));
        assert_eq!((event.scope, event.payload, event.reason), ("scope", "\"ü\"", None));
        assert_eq!(event.recorded_at, UnixMicros(EPOCH_2000_MICROS + 1));
    }

    #[test]
    fn what_is_cut_short_or_out_of_its_domain_is_refused_by_its_column() {
        let whole = row(&sound());
        for length in 0..whole.len() {
            let cut = Builder::default().row(&mut Fields(&whole[..length]));
            assert!(matches!(cut, Err(StoreError::Undecodable { .. })), "{length}");
        }
        let negative: &[u8] = &[255; 8];
        let cases: [(usize, Option<&[u8]>, &str); 5] = [
            (0, Some(negative), "position"),
            (0, None, "position"),
            (5, Some(b"short"), "command_id"),
            (7, Some(b"\xff"), "scope"),
            (12, Some(b"short"), "hash"),
        ];
        for (at, value, named) in cases {
            let mut fields = sound();
            fields[at] = value;
            let refused = read(&fields);
            assert!(
                matches!(refused, Err(StoreError::Undecodable { column, .. }) if column == named),
                "{refused:?}"
            );
        }
    }
}
