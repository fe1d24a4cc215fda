//! The frames that open a tunnel: OPEN by the client, OPENED or REFUSED by the server. Four bytes of length, big
//! endian, then a protobuf message. `docs/tunnel.md` holds the format and a test vector.
//!
//! What a peer sends is not trusted: lengths are bounded before anything is allocated, names and ports are parsed into
//! the model's types, and whatever is not understood is an error. Exactly one frame is read, never a byte more: what
//! follows belongs to the application.

use prost::Message;
use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use uuid::Uuid;
use weft_model::{CloseReason, ConfigVersion, Epoch, Port, Position, ServiceName};

/// Most bytes of a frame's message. The longest OPEN has about 250 bytes; the rest is room for a refusal's words and for
/// fields to come.
pub(crate) const FRAME_BYTES_MAX: usize = 4096;

/// Longest text in a refusal that is sent, in bytes, so that a frame always stays below its bound.
const TEXT_BYTES_MAX: usize = 1024;

const LENGTH_BYTES: usize = 4;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Open(Open),
    Opened,
    Refused(Refused),
}

/// The client wants a stream to a port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Open {
    pub(crate) service: ServiceName,
    pub(crate) port: Port,
    /// Where the application's connection came from, as the client's sidecar saw it.
    pub(crate) source: SocketAddr,
    /// Names the connection in the records of both ends.
    pub(crate) connection_id: Uuid,
    /// What the client's sidecar runs.
    pub(crate) version: ConfigVersion,
}

/// The server does not open the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) reason: CloseReason,
    /// The rule that refuses, if it is one.
    pub(crate) rule: Option<String>,
    /// More, in words.
    pub(crate) detail: String,
    /// What the server's sidecar runs; none if nothing.
    pub(crate) version: Option<ConfigVersion>,
}

/// Bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("frame of {0} bytes is longer than {FRAME_BYTES_MAX}")]
    TooLong(u32),
    #[error("frame is not readable")]
    Encoding(#[from] prost::DecodeError),
    #[error("frame has a malformed {0}")]
    Field(&'static str),
    #[error("frame of an unknown type")]
    Type,
    #[error("connection broke in a frame")]
    Io(#[from] io::Error),
}

impl Frame {
    /// The frame with its length before it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let message = self.to_wire();
        let length = u32::try_from(message.encoded_len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(LENGTH_BYTES + message.encoded_len());
        bytes.extend_from_slice(&length.to_be_bytes());
        // Writing into a vector cannot run out of room.
        let _ = message.encode(&mut bytes);
        bytes
    }

    /// Reads the message after the length.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        match wire::Frame::decode(bytes)?.kind.ok_or(FrameError::Type)? {
            wire::Kind::Open(open) => Ok(Self::Open(open.try_into()?)),
            wire::Kind::Opened(wire::Opened {}) => Ok(Self::Opened),
            wire::Kind::Refused(refused) => Ok(Self::Refused(refused.try_into()?)),
        }
    }

    fn to_wire(&self) -> wire::Frame {
        let kind = match self {
            Self::Open(open) => wire::Kind::Open(wire::Open {
                service: open.service.to_string(),
                port: u32::from(open.port.number()),
                source_address: open.source.to_string(),
                connection_id: open.connection_id.as_bytes().to_vec(),
                version: Some(open.version.into()),
            }),
            Self::Opened => wire::Kind::Opened(wire::Opened {}),
            Self::Refused(refused) => wire::Kind::Refused(wire::Refused {
                reason: refused.reason.as_str().to_owned(),
                rule: shortened(refused.rule.as_deref().unwrap_or_default()),
                detail: shortened(&refused.detail),
                version: refused.version.map(Into::into),
            }),
        };
        wire::Frame { kind: Some(kind) }
    }
}

/// Reads one frame.
pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Frame, FrameError> {
    let length = stream.read_u32().await?;
    let bytes = usize::try_from(length).ok().filter(|bytes| *bytes <= FRAME_BYTES_MAX);
    let mut message = vec![0; bytes.ok_or(FrameError::TooLong(length))?];
    stream.read_exact(&mut message).await?;
    Frame::decode(&message)
}

/// Writes one frame, so that it is on its way when this returns.
pub(crate) async fn write(stream: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    stream.write_all(&frame.encode()).await?;
    stream.flush().await
}

impl TryFrom<wire::Open> for Open {
    type Error = FrameError;

    fn try_from(open: wire::Open) -> Result<Self, FrameError> {
        let port = u16::try_from(open.port).ok().and_then(Port::new);
        Ok(Self {
            service: open.service.parse().map_err(|_| FrameError::Field("service"))?,
            port: port.ok_or(FrameError::Field("port"))?,
            source: open.source_address.parse().map_err(|_| FrameError::Field("source address"))?,
            connection_id: Uuid::from_slice(&open.connection_id)
                .map_err(|_| FrameError::Field("connection id"))?,
            version: open.version.ok_or(FrameError::Field("version"))?.into(),
        })
    }
}

impl TryFrom<wire::Refused> for Refused {
    type Error = FrameError;

    fn try_from(refused: wire::Refused) -> Result<Self, FrameError> {
        Ok(Self {
            reason: refused.reason.parse().map_err(|_| FrameError::Field("reason"))?,
            rule: (!refused.rule.is_empty()).then_some(refused.rule),
            detail: refused.detail,
            version: refused.version.map(Into::into),
        })
    }
}

impl From<ConfigVersion> for wire::Version {
    fn from(version: ConfigVersion) -> Self {
        Self { epoch: version.epoch.0, position: version.position.0 }
    }
}

impl From<wire::Version> for ConfigVersion {
    fn from(version: wire::Version) -> Self {
        Self::new(Epoch(version.epoch), Position(version.position))
    }
}

fn shortened(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].to_owned()
}

/// The protobuf messages. Numbers once given are never given to anything else.
mod wire {
    use prost::{Message, Oneof};

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Frame {
        #[prost(oneof = "Kind", tags = "1, 2, 3")]
        pub(super) kind: Option<Kind>,
    }

    #[derive(Clone, PartialEq, Oneof)]
    pub(super) enum Kind {
        #[prost(message, tag = "1")]
        Open(Open),
        #[prost(message, tag = "2")]
        Opened(Opened),
        #[prost(message, tag = "3")]
        Refused(Refused),
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Open {
        #[prost(string, tag = "1")]
        pub(super) service: String,
        #[prost(uint32, tag = "2")]
        pub(super) port: u32,
        #[prost(string, tag = "3")]
        pub(super) source_address: String,
        #[prost(bytes = "vec", tag = "4")]
        pub(super) connection_id: Vec<u8>,
        #[prost(message, optional, tag = "5")]
        pub(super) version: Option<Version>,
    }

    #[derive(Clone, Copy, PartialEq, Eq, Message)]
    pub(super) struct Opened {}

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Refused {
        #[prost(string, tag = "1")]
        pub(super) reason: String,
        #[prost(string, tag = "2")]
        pub(super) rule: String,
        #[prost(string, tag = "3")]
        pub(super) detail: String,
        #[prost(message, optional, tag = "4")]
        pub(super) version: Option<Version>,
    }

    #[derive(Clone, Copy, PartialEq, Eq, Message)]
    pub(super) struct Version {
        #[prost(uint64, tag = "1")]
        pub(super) epoch: u64,
        #[prost(uint64, tag = "2")]
        pub(super) position: u64,
    }
}

#[cfg(test)]
mod tests;
