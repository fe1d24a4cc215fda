//! Reads and writes of a socket that is shared: one that is read can be watched as well. After one that moved less than it might have, the
//! kernel is not asked again before it tells that there is more, as tokio's own do it: a system call less for every message.

use std::io::{self, IoSlice, IoSliceMut};
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Reads what there is. No byte is the end of the stream.
pub(super) fn poll_read(
    cx: &mut Context<'_>,
    socket: &TcpStream,
    into: &mut [u8],
) -> Poll<io::Result<usize>> {
    let room = into.len();
    poll_read_with(cx, socket, room, || socket.try_read(into))
}

/// The same into several places.
pub(super) fn poll_read_vectored(
    cx: &mut Context<'_>,
    socket: &TcpStream,
    into: &mut [IoSliceMut<'_>],
) -> Poll<io::Result<usize>> {
    let room = into.iter().map(|slice| slice.len()).sum();
    poll_read_with(cx, socket, room, || socket.try_read_vectored(into))
}

fn poll_read_with(
    cx: &mut Context<'_>,
    socket: &TcpStream,
    room: usize,
    mut read: impl FnMut() -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(socket.poll_read_ready(cx))?;
        match read() {
            Ok(bytes) => {
                if (1..room).contains(&bytes) {
                    done_for_now(socket, Interest::READABLE);
                }
                return Poll::Ready(Ok(bytes));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
}

/// Writes what the socket takes, at least a byte.
pub(super) fn poll_write(cx: &mut Context<'_>, socket: &TcpStream, bytes: &[u8]) -> Poll<io::Result<usize>> {
    poll_write_with(cx, socket, bytes.len(), || socket.try_write(bytes))
}

/// The same from several places.
pub(super) fn poll_write_vectored(
    cx: &mut Context<'_>,
    socket: &TcpStream,
    slices: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    let length = slices.iter().map(|slice| slice.len()).sum();
    poll_write_with(cx, socket, length, || socket.try_write_vectored(slices))
}

fn poll_write_with(
    cx: &mut Context<'_>,
    socket: &TcpStream,
    length: usize,
    write: impl Fn() -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(socket.poll_write_ready(cx))?;
        match write() {
            Ok(0) if length > 0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            Ok(bytes) => {
                if bytes < length {
                    done_for_now(socket, Interest::WRITABLE);
                }
                return Poll::Ready(Ok(bytes));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
}

/// Forgets that the socket was ready. Whatever comes from now on is told again by the kernel; an end that was told stays told.
fn done_for_now(socket: &TcpStream, interest: Interest) {
    let _ = socket.try_io(interest, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
}
