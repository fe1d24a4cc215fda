//! PostgreSQL's messages, as far as they must be told apart to know where a transaction is.
//!
//! A message is a type byte, a length that counts itself, and a body; the first one of a client has no type byte. Read
//! from the protocol's description ("Message Formats"); nothing else of it matters here.

use std::collections::BTreeMap;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// A message may hold a batch of events, which is bounded far below this.
const BYTES_MAX: usize = 256 * 1024 * 1024;

/// A message as it was received.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) kind: u8,
    bytes: Vec<u8>,
}

impl Message {
    /// Everything, to be passed on.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn body(&self) -> &[u8] {
        self.bytes.get(5..).unwrap_or_default()
    }

    /// The tag of a CommandComplete, such as `INSERT 0 3`.
    pub(crate) fn tag(&self) -> Option<&str> {
        (self.kind == b'C').then(|| text(self.body()).0)
    }
}

/// Reads the next message; none at the end.
pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin), first: bool) -> io::Result<Option<Message>> {
    let header = if first { 4 } else { 5 };
    let mut bytes = vec![0; header];
    match from.read_exact(&mut bytes).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    };
    let length = bytes.iter().skip(header - 4).fold(0_usize, |length, byte| length << 8 | usize::from(*byte));
    if !(4..=BYTES_MAX).contains(&length) {
        return Err(io::Error::other("not a message of PostgreSQL's protocol"));
    }
    bytes.resize(header - 4 + length, 0);
    from.read_exact(&mut bytes[header..]).await?;
    Ok(Some(Message { kind: if first { 0 } else { bytes[0] }, bytes }))
}

/// What a client's message does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Begins a transaction.
    Begin,
    /// Inserts events, with what is written down beside them.
    Insert,
    /// Moves the projector's checkpoint.
    Project,
    /// Commits.
    Commit,
    /// Anything else.
    Other,
}

/// The statements that a client has prepared, by name.
#[derive(Debug, Default)]
pub(crate) struct Statements(BTreeMap<String, Step>);

impl Statements {
    /// What the message does, as far as it begins, executes or ends what is of interest here.
    pub(crate) fn step(&mut self, message: &Message) -> Step {
        match message.kind {
            b'Q' => of_sql(text(message.body()).0),
            b'P' => {
                let (name, rest) = text(message.body());
                self.0.insert(name.to_owned(), of_sql(text(rest).0));
                Step::Other
            }
            b'B' => {
                let (_, rest) = text(message.body());
                self.0.get(text(rest).0).copied().unwrap_or(Step::Other)
            }
            _ => Step::Other,
        }
    }
}

fn of_sql(sql: &str) -> Step {
    let starts =
        |prefix: &str| sql.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
    if starts("begin") {
        Step::Begin
    } else if starts("commit") {
        Step::Commit
    } else if starts("with events as (insert into weft.event ") {
        Step::Insert
    } else if starts("update weft.projection") {
        Step::Project
    } else {
        Step::Other
    }
}

/// A text that ends with a zero byte, and what follows it.
fn text(body: &[u8]) -> (&str, &[u8]) {
    let end = body.iter().position(|byte| *byte == 0).unwrap_or(body.len());
    (std::str::from_utf8(&body[..end]).unwrap_or_default(), body.get(end + 1..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
        [&[kind], &length[..], body].concat()
    }

    #[tokio::test]
    async fn messages_are_told_apart_wherever_they_are_cut() {
        let mut bytes = [&8_u32.to_be_bytes()[..], b"\0\x03\0\0"].concat();
        bytes.extend(message(b'P', b"s1\0with events as (insert into weft.event (a)\0\0\0"));
        bytes.extend(message(b'B', b"\0s1\0\0\0"));
        bytes.extend(message(b'Q', b"COMMIT\0"));
        let mut from = bytes.as_slice();
        assert_eq!(read(&mut from, true).await.unwrap().unwrap().bytes().len(), 8);
        let mut statements = Statements::default();
        let mut steps = Vec::new();
        while let Some(message) = read(&mut from, false).await.unwrap() {
            steps.push(statements.step(&message));
        }
        assert_eq!(steps, [Step::Other, Step::Insert, Step::Commit]);
        assert!(read(&mut &b"\x51\0\0\0\x01"[..], false).await.is_err());
    }
}
