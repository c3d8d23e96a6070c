//! The host's sockets of one guest's flows, each in its flow's place.
//!
//! Readiness is edge-triggered: a socket is read or written until it would block, and what it is ready
//! for is remembered in between.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use mio::net::{TcpStream, UdpSocket};
use mio::{Interest, Registry, Token};
use socket2::{Domain, Protocol, Socket, Type};

use crate::egress::stream::{HostStream, PolledStream};
use crate::engine::budget::Room;
use crate::engine::stack::{Connection, Phase};
use crate::message::ForwardId;

/// Bytes moved for one flow before the others have their turn.
const TURN_BYTES: usize = 1 << 20;

/// Every host socket of one guest.
#[derive(Default)]
pub struct Sockets {
    places: Vec<Option<HostSocket>>,
}

/// One flow's host socket.
pub enum HostSocket {
    /// A stream: TCP that was dialled, or of any kind that was accepted.
    Stream(StreamSocket),
    /// UDP, connected.
    Udp(UdpSocket),
    /// An unprivileged ping socket, connected.
    Echo(UdpSocket),
    /// A client of a UDP forward.
    Client {
        /// The forward.
        forward: ForwardId,
        /// The client.
        address: SocketAddr,
    },
}

/// A stream socket and what it is ready for.
pub struct StreamSocket {
    stream: PolledStream,
    /// What was read from it before it came here; it goes to the guest first.
    early: Vec<u8>,
    /// Its other side is to see an ordinary end, however the guest's connection ends before it is open.
    ends_plainly: bool,
    /// Not yet connected.
    pub dialling: bool,
    readable: bool,
    writable: bool,
    /// The other side has finished sending; no further edge will say so.
    finishing: bool,
    finished_writing: bool,
}

/// What moving bytes came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// Bytes from the guest.
    pub up: usize,
    /// Bytes to the guest.
    pub down: usize,
    /// The host's side failed: reset the guest's.
    pub failed: bool,
    /// There is more to move; others first.
    pub more: bool,
}

impl Sockets {
    /// A flow's socket.
    pub fn get_mut(&mut self, at: usize) -> Option<&mut HostSocket> {
        self.places.get_mut(at)?.as_mut()
    }

    /// Puts a socket in a flow's place.
    pub fn put(&mut self, at: usize, socket: HostSocket) {
        if self.places.len() <= at {
            self.places.resize_with(at + 1, || None);
        }
        self.places[at] = Some(socket);
    }

    /// Closes a flow's socket, with RST if asked. Closing takes it out of the poller.
    pub fn close(&mut self, at: usize, reset: bool) {
        let Some(socket) = self.places.get_mut(at).and_then(Option::take) else {
            return;
        };
        if let HostSocket::Stream(socket) = &socket
            && reset
            && !socket.ends_plainly
        {
            socket.stream.set_reset();
        }
    }

    /// Begins to dial a TCP flow's host side.
    ///
    /// # Errors
    /// The host's own refusal; an answer of the network comes later.
    pub fn dial(&mut self, registry: &Registry, at: usize, to: SocketAddr) -> io::Result<()> {
        let mut stream = PolledStream::Tcp(TcpStream::connect(to)?);
        stream.register(registry, Token(at))?;
        self.put(at, HostSocket::Stream(StreamSocket::new(stream, true)));
        Ok(())
    }

    /// Takes a connection that is there already: of a forward, a tunnel, or to the gateway. `early` was read
    /// from it before. `ends_plainly`: closed rather than reset where the guest does not take it.
    ///
    /// # Errors
    /// The poller's.
    pub fn accept(
        &mut self,
        registry: &Registry,
        at: usize,
        stream: HostStream,
        early: Vec<u8>,
        ends_plainly: bool,
    ) -> io::Result<()> {
        let mut stream = PolledStream::new(stream)?;
        stream.register(registry, Token(at))?;
        let mut socket = StreamSocket::new(stream, false);
        socket.early = early;
        socket.ends_plainly = ends_plainly;
        socket.connected();
        self.put(at, HostSocket::Stream(socket));
        Ok(())
    }

    /// Opens a UDP flow's socket: a fresh one, connected, so that only its peer can answer.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn open_udp(&mut self, registry: &Registry, at: usize, to: SocketAddr) -> io::Result<()> {
        let any: SocketAddr = match to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let mut socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        registry.register(&mut socket, Token(at), Interest::READABLE)?;
        self.put(at, HostSocket::Udp(socket));
        Ok(())
    }

    /// Opens an echo flow's socket: an unprivileged ping socket, where the host permits them
    /// (on Linux, `net.ipv4.ping_group_range`, for both families).
    ///
    /// # Errors
    /// The host's refusal.
    pub fn open_echo(&mut self, registry: &Registry, at: usize, to: SocketAddr) -> io::Result<()> {
        let protocol = match to {
            SocketAddr::V4(_) => Protocol::ICMPV4,
            SocketAddr::V6(_) => Protocol::ICMPV6,
        };
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(protocol))?;
        socket.set_nonblocking(true)?;
        socket.connect(&SocketAddr::new(to.ip(), 0).into())?;
        // A ping socket is a datagram socket like any other once it is open.
        let mut socket = UdpSocket::from_std(socket.into());
        registry.register(&mut socket, Token(at), Interest::READABLE)?;
        self.put(at, HostSocket::Echo(socket));
        Ok(())
    }
}

impl StreamSocket {
    fn new(stream: PolledStream, dialling: bool) -> Self {
        Self {
            stream,
            early: Vec::new(),
            ends_plainly: false,
            dialling,
            readable: false,
            writable: false,
            finishing: false,
            finished_writing: false,
        }
    }

    /// Notes what the poller said.
    pub fn handle_ready(&mut self, event: &mio::event::Event) {
        self.readable |= event.is_readable() || event.is_read_closed();
        self.writable |= event.is_writable();
        self.finishing |= event.is_read_closed() || event.is_error();
    }

    /// What a dial has come to: `None` while it is under way.
    pub fn poll_dial(&mut self) -> Option<io::Result<()>> {
        let result = self.stream.poll_dial()?;
        if result.is_ok() {
            self.connected();
        }
        Some(result)
    }

    fn connected(&mut self) {
        self.dialling = false;
        self.writable = true;
        // What the guest sends is on its way already in the pieces that it chose.
        self.stream.set_nodelay();
    }

    /// Moves bytes both ways between the guest's connection and this socket, as far as both go and there
    /// is room under the flow's budget.
    pub fn transfer(&mut self, connection: &mut Connection, room: Room) -> Moved {
        let mut moved = Moved {
            up: 0,
            down: 0,
            failed: false,
            more: false,
        };
        if self.ends_plainly && connection.phase() == Phase::Open {
            self.ends_plainly = false;
        }
        loop {
            let before = moved.up + moved.down;
            if let Err(error) = self
                .transfer_up(connection, room.up, &mut moved)
                .and_then(|()| self.transfer_down(connection, room.down, &mut moved))
            {
                tracing::trace!(%error, "host socket failed");
                moved.failed = true;
                return moved;
            }
            let total = moved.up + moved.down;
            if total == before {
                return moved;
            }
            if total >= TURN_BYTES {
                moved.more = true;
                return moved;
            }
        }
    }

    fn transfer_up(&mut self, connection: &mut Connection, most: usize, moved: &mut Moved) -> io::Result<()> {
        let most = most.saturating_sub(moved.up);
        if self.writable && most > 0 && connection.has_received() {
            let mut offered = 0;
            let written = connection.lend_received(|bytes| {
                offered = bytes.len().min(most);
                self.stream.write(&bytes[..offered])
            });
            match written {
                Ok(length) => {
                    moved.up += length;
                    // A short write means a full buffer; its end will be an edge.
                    self.writable = length == offered;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if !self.finished_writing && connection.is_received_whole() {
            self.finished_writing = true;
            self.stream.finish_writing()?;
        }
        Ok(())
    }

    fn transfer_down(
        &mut self,
        connection: &mut Connection,
        most: usize,
        moved: &mut Moved,
    ) -> io::Result<()> {
        let most = most.saturating_sub(moved.down);
        if most == 0 || !connection.has_room() {
            return Ok(());
        }
        if !self.early.is_empty() {
            let early = &self.early;
            let taken = connection.lend_room(|bytes| {
                let length = early.len().min(bytes.len()).min(most);
                bytes[..length].copy_from_slice(&early[..length]);
                Ok::<_, io::Error>(length)
            })?;
            self.early.drain(..taken);
            moved.down += taken;
            return Ok(());
        }
        if !self.readable {
            return Ok(());
        }
        let mut room = 0;
        let read = connection.lend_room(|bytes| {
            room = bytes.len().min(most);
            self.stream.read(&mut bytes[..room])
        });
        match read {
            Ok(0) if room != 0 => {
                self.readable = false;
                connection.close();
            }
            Ok(length) => {
                moved.down += length;
                // A short read means an empty buffer, and an edge when more comes; but the end that was
                // announced already will not be announced again.
                self.readable = length == room || self.finishing;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}
