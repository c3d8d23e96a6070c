//! One frame a datagram over a bound Unix socket: vfkit, krunkit, QEMU's `-netdev dgram`.
//!
//! The first sender is adopted; answers go to its address. vfkit may send the four bytes `VFKT` first,
//! which carry nothing. There is no end of stream: on Linux the socket is connected to the peer, so
//! that a full queue wakes us, and connecting again by path tells whether the peer is still there.
//! A connected socket hears nobody else. Elsewhere the sender of each datagram is looked at; those of
//! strangers are dropped and counted.

use std::io;
use std::os::unix::net::SocketAddr;
use std::path::{Path, PathBuf};

use mio::event::Source as _;
use mio::net::UnixDatagram;
use mio::{Interest, Registry, Token};

use crate::engine::transmit::{PREFIX_BYTES, Transmit};
use crate::link::stream::widen;
use crate::link::{FRAME_BYTES_MAX, Filled, LinkError, would_block};

const MAGIC: &[u8] = b"VFKT";
/// Where no readiness event comes for a peer's full queue.
const RETRY_MS: u64 = 1;

/// The socket of one hypervisor.
pub struct DatagramLink {
    socket: UnixDatagram,
    peer: PathBuf,
    /// The kernel keeps strangers out.
    connected: bool,
    buffer: Box<[u8]>,
    length: usize,
    retry: bool,
    /// Datagrams of other senders, not yet taken note of.
    strangers: u64,
}

impl DatagramLink {
    /// Adopts the sender of the first datagram of a bound socket, which is `first`.
    ///
    /// # Errors
    /// When the sender cannot be answered.
    pub fn adopt(socket: std::os::unix::net::UnixDatagram, peer: &Path, first: &[u8]) -> io::Result<Self> {
        Self::adopt_as(socket, peer, first, cfg!(target_os = "linux"))
    }

    fn adopt_as(
        socket: std::os::unix::net::UnixDatagram,
        peer: &Path,
        first: &[u8],
        connected: bool,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        widen(&socket);
        if connected {
            socket.connect(peer)?;
        }
        let mut buffer = vec![0; FRAME_BYTES_MAX].into_boxed_slice();
        let first = if first == MAGIC { &[] } else { first };
        buffer[..first.len()].copy_from_slice(first);
        Ok(Self {
            socket: UnixDatagram::from_std(socket),
            peer: peer.to_owned(),
            connected,
            buffer,
            length: first.len(),
            retry: false,
            strangers: 0,
        })
    }

    pub(super) fn register(
        &mut self,
        registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        self.socket.register(registry, token, interest)
    }

    pub(super) fn fill(&mut self) -> Result<Filled, LinkError> {
        if self.length != 0 {
            // The first frame, which came before there was a link.
            return Ok(Filled::Some);
        }
        match self.socket.recv_from(&mut self.buffer) {
            Ok((length, sender)) => {
                if !self.connected && !is_peer(&sender, &self.peer) {
                    self.strangers += 1;
                } else if &self.buffer[..length] != MAGIC {
                    self.length = length;
                }
                Ok(Filled::Some)
            }
            Err(error) if would_block(&error) => Ok(Filled::Nothing),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(LinkError::Closed),
            Err(error) => Err(LinkError::Io(error)),
        }
    }

    pub(super) fn next_frame(&mut self) -> Option<&[u8]> {
        let length = std::mem::take(&mut self.length);
        (length != 0).then(|| &self.buffer[..length])
    }

    pub(super) fn flush(&mut self, queue: &mut Transmit) -> Result<bool, LinkError> {
        self.retry = false;
        while let Some(frame) = queue.first_frame() {
            let length = frame.len();
            let sent = if self.connected {
                self.socket.send(frame)
            } else {
                self.socket.send_to(frame, &self.peer)
            };
            match sent {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if would_block(&error) => {
                    self.retry = !self.connected;
                    return Ok(false);
                }
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                    self.retry = true;
                    return Ok(false);
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionRefused
                            | io::ErrorKind::NotFound
                            | io::ErrorKind::NotConnected
                            | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    return Err(LinkError::Closed);
                }
                Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => {}
                Err(error) => return Err(LinkError::Io(error)),
            }
            queue.consume(PREFIX_BYTES + length);
        }
        Ok(true)
    }

    /// How many datagrams of other senders came since this was last asked.
    pub(super) fn take_strangers(&mut self) -> u64 {
        std::mem::take(&mut self.strangers)
    }

    pub(super) fn retry_after_ms(&self) -> Option<u64> {
        self.retry.then_some(RETRY_MS)
    }

    /// Whether something still listens at the peer's path. A hypervisor that was started anew there is
    /// answered from now on.
    pub(super) fn is_alive(&self) -> bool {
        if self.connected {
            socket2::SockAddr::unix(&self.peer)
                .and_then(|address| socket2::SockRef::from(&self.socket).connect(&address))
                .is_ok()
        } else {
            self.peer.exists()
        }
    }
}

fn is_peer(sender: &SocketAddr, peer: &Path) -> bool {
    sender.as_pathname() == Some(peer)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram as StdDatagram;

    use super::*;

    struct Sockets(PathBuf);

    impl Sockets {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vnet-dgram{}-{name}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn bind(&self, name: &str) -> (StdDatagram, PathBuf) {
            let path = self.0.join(name);
            (StdDatagram::bind(&path).unwrap(), path)
        }
    }

    impl Drop for Sockets {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// The frames that a link has, until it would wait.
    fn frames(link: &mut DatagramLink) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while link.fill().unwrap() == Filled::Some {
            frames.extend(link.next_frame().map(<[u8]>::to_vec));
        }
        frames
    }

    #[test]
    fn strangers_are_counted_where_the_kernel_does_not_keep_them_out() {
        let sockets = Sockets::new("open");
        let ((ours, at), (peer, peer_path), (stranger, _)) = (
            sockets.bind("ours"),
            sockets.bind("peer"),
            sockets.bind("stranger"),
        );
        let mut link = DatagramLink::adopt_as(ours, &peer_path, b"first", false).unwrap();
        stranger.send_to(b"forged", &at).unwrap();
        peer.send_to(b"second", &at).unwrap();
        stranger.send_to(b"forged", &at).unwrap();
        assert_eq!(frames(&mut link), [b"first".to_vec(), b"second".to_vec()]);
        assert_eq!((link.take_strangers(), link.take_strangers()), (2, 0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_connected_socket_hears_its_peer_alone() {
        let sockets = Sockets::new("connected");
        let ((ours, at), (peer, peer_path), (stranger, _)) = (
            sockets.bind("ours"),
            sockets.bind("peer"),
            sockets.bind("stranger"),
        );
        let mut link = DatagramLink::adopt(ours, &peer_path, MAGIC).unwrap();
        assert!(stranger.send_to(b"forged", &at).is_err(), "the kernel refuses it");
        peer.send_to(b"frame", &at).unwrap();
        assert_eq!(frames(&mut link), [b"frame".to_vec()]);
        assert_eq!(link.take_strangers(), 0);
    }

    #[cfg(test)]
    impl DatagramLink {
        /// A link as it is where sockets are not connected.
        pub(crate) fn adopt_unconnected(socket: StdDatagram, peer: &Path, first: &[u8]) -> Self {
            Self::adopt_as(socket, peer, first, false).unwrap()
        }
    }
}
