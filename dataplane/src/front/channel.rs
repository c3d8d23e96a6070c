//! The two directions of the channel, over tokio.
//!
//! What waits to be sent is bounded: beyond [`WAITING_MAX`] a connection is closed instead, and counted. So is
//! whatever cannot be sent at all, and whatever comes that is no message. None of it ends the channel, and there is
//! no end of it to be seen: a dataplane has its lifeline, and its front sees its child go.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram as StdUnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, Type};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::sync::mpsc;

use crate::egress::stream::HostStream;
use crate::front::FrontMessage;
use crate::front::codec::{self, MESSAGE_BYTES_MAX};
use crate::metrics::{FrontRefusal, Metrics};

/// Connections that may wait to be handed over.
pub(super) const WAITING_MAX: usize = 64;
/// Asked of the system for each direction, bytes: several of the longest messages.
const BUFFER_BYTES: usize = 4 * MESSAGE_BYTES_MAX;
/// How long a full queue is left alone where the system does not say when there is room.
const FULL_REST: Duration = Duration::from_millis(5);

/// Why a connection was not handed over. It is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotSent {
    /// As many wait already as may.
    #[error("{WAITING_MAX} connections wait already for the front, which takes none")]
    Full,
    /// The message is longer than any.
    #[error("a message to the front is longer than {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
    /// The channel is no more.
    #[error("the channel to the front is closed")]
    Closed,
}

/// The way to the other side. Clones share it.
#[derive(Debug, Clone)]
pub struct FrontSender {
    queue: mpsc::Sender<(Vec<u8>, OwnedFd)>,
    metrics: Arc<Metrics>,
}

/// The way from the other side.
#[derive(Debug)]
pub struct FrontReceiver {
    socket: Arc<UnixDatagram>,
    buffer: Box<[u8]>,
    metrics: Arc<Metrics>,
}

/// The two ends of a channel, neither inherited by children.
///
/// # Errors
/// The system's: no descriptors.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    // In one step where the system can: another thread may start a child meanwhile.
    let (one, other) = StdUnixDatagram::pair()?;
    Ok((one.into(), other.into()))
}

/// Opens one end, within a runtime. What is not handed over is counted in `metrics`.
///
/// # Errors
/// It is no datagram socket, or cannot be followed.
pub fn open(end: OwnedFd, metrics: Arc<Metrics>) -> io::Result<(FrontSender, FrontReceiver)> {
    let socket = SockRef::from(&end);
    if socket.r#type()? != Type::DGRAM {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no end of a socketpair of datagrams",
        ));
    }
    // The system may give less, which costs waiting.
    let _ = socket.set_send_buffer_size(BUFFER_BYTES);
    let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
    let socket = StdUnixDatagram::from(end);
    socket.set_nonblocking(true)?;
    let socket = Arc::new(UnixDatagram::from_std(socket)?);
    let (queue, waiting) = mpsc::channel(WAITING_MAX);
    tokio::spawn(write(Arc::clone(&socket), waiting, Arc::clone(&metrics)));
    let sender = FrontSender {
        queue,
        metrics: Arc::clone(&metrics),
    };
    let receiver = FrontReceiver {
        socket,
        buffer: vec![0; MESSAGE_BYTES_MAX].into_boxed_slice(),
        metrics,
    };
    Ok((sender, receiver))
}

impl FrontSender {
    /// Hands a connection over; at once, from any thread. It is closed here in any case.
    ///
    /// # Errors
    /// [`NotSent`], which is counted.
    pub fn send(&self, message: &FrontMessage, stream: impl Into<OwnedFd>) -> Result<(), NotSent> {
        let sent = match codec::encode(message) {
            None => Err(NotSent::TooLong),
            Some(bytes) => self
                .queue
                .try_send((bytes, stream.into()))
                .map_err(|error| match error {
                    mpsc::error::TrySendError::Full(_) => NotSent::Full,
                    mpsc::error::TrySendError::Closed(_) => NotSent::Closed,
                }),
        };
        if let Err(error) = &sent {
            let cause = match error {
                NotSent::Full | NotSent::TooLong => FrontRefusal::Full,
                NotSent::Closed => FrontRefusal::Send,
            };
            self.metrics.front_refusals.of(cause).increment();
        }
        sent
    }
}

impl FrontReceiver {
    /// The next connection that the other side hands over. Cancel safe.
    ///
    /// # Errors
    /// The socket cannot be read any more.
    pub async fn receive(&mut self) -> io::Result<(FrontMessage, HostStream)> {
        loop {
            let Self {
                socket,
                buffer,
                metrics,
            } = self;
            let received = socket
                .async_io(Interest::READABLE, || codec::receive(&**socket, buffer))
                .await?;
            match received {
                Ok(received) => return Ok(received),
                Err(malformed) => {
                    metrics.front_refusals.of(FrontRefusal::Malformed).increment();
                    tracing::warn!(error = %malformed, "a message of the front's channel is left out");
                }
            }
        }
    }
}

/// Sends, again as long as the other side's queue is full by macOS's word for it, behind which no readiness comes.
async fn when_there_is_room<F: Future<Output = io::Result<()>>>(send: impl Fn() -> F) -> io::Result<()> {
    loop {
        match send().await {
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => tokio::time::sleep(FULL_REST).await,
            sent => return sent,
        }
    }
}

/// Writes what waits, until nobody can send any more.
async fn write(
    socket: Arc<UnixDatagram>,
    mut waiting: mpsc::Receiver<(Vec<u8>, OwnedFd)>,
    metrics: Arc<Metrics>,
) {
    while let Some((bytes, descriptor)) = waiting.recv().await {
        let send = || codec::send(&*socket, &bytes, &[&descriptor]);
        let sent = when_there_is_room(|| socket.async_io(Interest::WRITABLE, send)).await;
        if let Err(error) = sent {
            metrics.front_refusals.of(FrontRefusal::Send).increment();
            tracing::debug!(%error, "a connection cannot be handed over");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_queue_that_is_full_by_another_word_is_waited_for_and_what_fails_is_not() {
        let tries = AtomicU32::new(0);
        let full_twice = || async {
            match tries.fetch_add(1, Ordering::Relaxed) {
                0 | 1 => Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
                _ => Ok(()),
            }
        };
        when_there_is_room(full_twice).await.unwrap();
        assert_eq!(tries.load(Ordering::Relaxed), 3);
        let gone = || async { Err(io::ErrorKind::ConnectionReset.into()) };
        assert!(when_there_is_room(gone).await.is_err());
    }
}
