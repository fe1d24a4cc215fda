//! A hand-made end of a tunnel, written from `docs/tunnel.md` alone.

use prost::Message;
use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use weft_identity::credential::Credential;
use weft_identity::tls::{ExpectedPeer, TlsIdentity};

/// A frame, of one of these kinds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Frame {
    pub(crate) data: Option<Vec<u8>>,
    pub(crate) end: bool,
    pub(crate) open: Option<Open>,
    pub(crate) opened: Option<Opened>,
    pub(crate) refused: Option<Refused>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Open {
    #[prost(string, tag = "1")]
    pub(crate) service: String,
    #[prost(uint32, tag = "2")]
    pub(crate) port: u32,
    #[prost(string, tag = "3")]
    pub(crate) source_address: String,
    #[prost(bytes = "vec", tag = "4")]
    pub(crate) connection_id: Vec<u8>,
    #[prost(message, optional, tag = "5")]
    pub(crate) version: Option<Version>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Opened {}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Refused {
    #[prost(string, tag = "1")]
    pub(crate) reason: String,
    #[prost(string, tag = "2")]
    pub(crate) rule: String,
    #[prost(string, tag = "3")]
    pub(crate) detail: String,
    #[prost(message, optional, tag = "4")]
    pub(crate) version: Option<Version>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct Version {
    #[prost(uint64, tag = "1")]
    pub(crate) epoch: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) position: u64,
}

/// An OPEN that a sidecar of a very old version could send.
pub(crate) fn open(service: &str, port: u32) -> Frame {
    Frame {
        open: Some(Open {
            service: service.into(),
            port,
            source_address: "127.0.0.1:1".into(),
            connection_id: vec![7; 16],
            version: Some(Version { epoch: 0, position: 0 }),
        }),
        ..Frame::default()
    }
}

/// TLS to a sidecar, as the holder of `credential`.
pub(crate) async fn connect(
    address: SocketAddr,
    credential: Credential,
    alpn: &[&[u8]],
) -> io::Result<TlsStream<TcpStream>> {
    let config = TlsIdentity::new(credential).client_config(ExpectedPeer::Any, alpn);
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(config).connect("db.default".try_into().unwrap(), stream).await
}

/// Sends a frame and reads the answer.
pub(crate) async fn exchange(tunnel: &mut TlsStream<TcpStream>, frame: &Frame) -> io::Result<Frame> {
    write(tunnel, frame).await?;
    read(tunnel).await
}

pub(crate) async fn write(tunnel: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> io::Result<()> {
    let (kind, bytes) = match frame {
        Frame { data: Some(data), .. } => (0, data.clone()),
        Frame { end: true, .. } => (1, Vec::new()),
        Frame { open: Some(open), .. } => (16, open.encode_to_vec()),
        Frame { opened: Some(opened), .. } => (17, opened.encode_to_vec()),
        Frame { refused: Some(refused), .. } => (18, refused.encode_to_vec()),
        _ => panic!("an empty frame"),
    };
    tunnel.write_u32(kind << 24 | u32::try_from(bytes.len()).unwrap()).await?;
    tunnel.write_all(&bytes).await?;
    tunnel.flush().await
}

pub(crate) async fn read(tunnel: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
    let head = tunnel.read_u32().await?;
    let mut bytes = vec![0; (head & 0x00ff_ffff).try_into().unwrap()];
    tunnel.read_exact(&mut bytes).await?;
    let none = Frame::default();
    Ok(match head >> 24 {
        0 => Frame { data: Some(bytes), ..none },
        1 => Frame { end: true, ..none },
        16 => Frame { open: Some(Open::decode(bytes.as_slice()).unwrap()), ..none },
        17 => Frame { opened: Some(Opened::decode(bytes.as_slice()).unwrap()), ..none },
        18 => Frame { refused: Some(Refused::decode(bytes.as_slice()).unwrap()), ..none },
        kind => panic!("a frame of kind {kind}"),
    })
}

/// Bytes of the application.
pub(crate) fn data(bytes: &[u8]) -> Frame {
    Frame { data: Some(bytes.to_vec()), ..Frame::default() }
}

/// The end of the application's stream.
pub(crate) fn end() -> Frame {
    Frame { end: true, ..Frame::default() }
}
