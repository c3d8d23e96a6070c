//! One TCP connection of a guest: a smoltcp `Interface` and a one-socket set, behind our own handle.
//!
//! One interface per flow keeps the cost of a packet independent of how many flows there are: the
//! flow table has found the connection before smoltcp sees the segment. What smoltcp leaves open is
//! closed here and in the flow table: buffer sizes that no guest can turn into a panic, explicit
//! settings instead of its defaults, an end to states that would last for ever.

use std::net::{IpAddr, SocketAddr};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{CongestionControl, RecvError, Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr, IpListenEndpoint};

use crate::engine::Time;
use crate::engine::frame::EtherType;
use crate::engine::naming::Check;
use crate::engine::ring::Slot;
use crate::engine::transmit::Transmit;

/// Beyond this many bytes carried, an idle flow gives ring memory back.
const SHRINK_AFTER_BYTES: u64 = 16 << 10;

/// One connection's end towards the guest.
pub struct Connection {
    interface: Interface,
    // Before `slot`: what holds the ring slices is dropped first.
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    slot: Slot,
    /// That of its packets.
    ether_type: EtherType,
    mtu_bytes: usize,
    /// Bytes moved since the rings last gave memory back.
    since_shrink: u64,
    /// Something came out of order, or twice, since the beginning: bytes may lie in the ring beyond those that can
    /// be read, and smoltcp does not say.
    has_gaps: bool,
    /// What the guest's bytes are held to, where the verdict demands a name and it may still be spoken.
    pub(super) check: Option<Box<Check>>,
}

/// What a connection has to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Opening: the handshake with the guest is under way.
    Opening,
    /// Open in one or both directions, or closing in order.
    Open,
    /// Over: nothing more will be sent or received.
    Over,
}

impl Connection {
    /// Answers a guest's SYN, whose whole packet is `syn`, without IPv6 extension headers, like every
    /// packet of the connection. The caller feeds nothing else before.
    pub fn accept(
        now: Time,
        peer: SocketAddr,
        mtu_bytes: usize,
        slot: Slot,
        seed: u64,
        syn: &[u8],
        out: &mut Transmit,
    ) -> Option<Self> {
        let mut connection = Self::new(now, peer.ip(), mtu_bytes, slot, seed);
        let endpoint = IpListenEndpoint {
            addr: Some(peer.ip().into()),
            port: peer.port(),
        };
        connection.socket().listen(endpoint).ok()?;
        connection.handle_packet(now, syn, 0, out);
        (connection.state() == State::SynReceived).then_some(connection)
    }

    /// Opens a connection towards the guest, from `client` as the guest will see it.
    pub fn connect(
        now: Time,
        client: SocketAddr,
        guest: SocketAddr,
        mtu_bytes: usize,
        slot: Slot,
        seed: u64,
    ) -> Option<Self> {
        let mut connection = Self::new(now, client.ip(), mtu_bytes, slot, seed);
        let Self {
            interface,
            sockets,
            handle,
            ..
        } = &mut connection;
        let from = IpListenEndpoint {
            addr: Some(client.ip().into()),
            port: client.port(),
        };
        let to = (smoltcp::wire::IpAddress::from(guest.ip()), guest.port());
        sockets
            .get_mut::<Socket<'_>>(*handle)
            .connect(interface.context(), to, from)
            .ok()?;
        Some(connection)
    }

    fn new(now: Time, address: IpAddr, mtu_bytes: usize, mut slot: Slot, seed: u64) -> Self {
        // SAFETY: called once for this slot; `sockets`, which holds the slices, is declared and so
        // dropped before `slot`.
        let (receive, send) = unsafe { slot.slices() };
        let mut socket = Socket::new(SocketBuffer::new(receive), SocketBuffer::new(send));
        // The links lose nothing, and slow start reaches the window at once. Where one does lose (a bridge
        // between, a full queue), a smaller window turns a loss into a fast retransmission, not a time-out.
        socket.set_congestion_control(CongestionControl::Reno);
        socket.set_nagle_enabled(false);
        // One acknowledgement per batch of segments, because egress runs once per batch.
        socket.set_ack_delay(None);

        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let (ether_type, prefix_length) = match address {
            IpAddr::V4(_) => (EtherType::Ipv4, 32),
            IpAddr::V6(_) => (EtherType::Ipv6, 128),
        };
        let mut interface = Interface::new(
            config,
            &mut Port {
                ether_type,
                mtu_bytes,
                packet: None,
                out: None,
            },
            instant(now),
        );
        interface.update_ip_addrs(|addresses| {
            // Room for one is always there; the set is new.
            let _ = addresses.push(IpCidr::new(address.into(), prefix_length));
        });
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            interface,
            sockets,
            handle,
            slot,
            ether_type,
            mtu_bytes,
            since_shrink: 0,
            has_gaps: false,
            check: None,
        }
    }

    /// Takes a packet of this connection. Only what must be said at once (a challenge) is queued
    /// here; everything else leaves with [`Self::poll_transmit`], once for a whole batch. `payload_bytes`: how many
    /// bytes of the stream it carries.
    pub fn handle_packet(&mut self, now: Time, packet: &[u8], payload_bytes: u32, out: &mut Transmit) {
        let with_length = self.with_length(packet);
        let packet = with_length.as_deref().unwrap_or(packet);
        let mut port = Port {
            ether_type: self.ether_type,
            mtu_bytes: self.mtu_bytes,
            packet: Some(packet),
            out: Some(out),
        };
        let readable = |sockets: &SocketSet<'static>| sockets.get::<Socket<'_>>(self.handle).recv_queue();
        let watched = (payload_bytes > 0 && !self.has_gaps).then(|| readable(&self.sockets));
        self.interface
            .poll_ingress_single(instant(now), &mut port, &mut self.sockets);
        if watched.is_some_and(|before| before == readable(&self.sockets)) {
            self.has_gaps = true;
        }
    }

    /// An IPv4 packet that came without its length ([`crate::engine::ip`]), with it: smoltcp demands one.
    #[inline]
    fn with_length(&self, packet: &[u8]) -> Option<Vec<u8>> {
        const LENGTH: std::ops::Range<usize> = 2..4;
        if self.ether_type != EtherType::Ipv4 || packet.get(LENGTH) != Some(&[0, 0]) {
            return None;
        }
        let mut packet = packet.to_vec();
        let length = u16::try_from(packet.len()).ok()?;
        packet[LENGTH].copy_from_slice(&length.to_be_bytes());
        Some(packet)
    }

    /// Queues what the connection has to send. False when the queue ran out of room first.
    pub fn poll_transmit(&mut self, now: Time, out: &mut Transmit) -> bool {
        let mut port = Port {
            ether_type: self.ether_type,
            mtu_bytes: self.mtu_bytes,
            packet: None,
            out: Some(out),
        };
        loop {
            let (result, blocked) = {
                let before = port.queued();
                let result = self
                    .interface
                    .poll_egress(instant(now), &mut port, &mut self.sockets);
                (result, port.queued() == before)
            };
            if matches!(result, smoltcp::iface::PollResult::None) || blocked {
                return port.has_room();
            }
        }
    }

    /// When it wants [`Self::poll_transmit`] next, if at all.
    pub fn poll_timeout(&mut self, now: Time) -> Option<Time> {
        let at = self.interface.poll_at(instant(now), &self.sockets)?;
        Some(Time::from_micros(u64::try_from(at.total_micros()).unwrap_or(0)))
    }

    /// Lends what the guest sent, once; `take` says how much of it was taken.
    pub fn lend_received<E>(&mut self, take: impl FnOnce(&[u8]) -> Result<usize, E>) -> Result<usize, E> {
        if self.check.is_some() {
            return self.lend_checked(take);
        }
        let result = self.socket().recv(|bytes| match take(bytes) {
            Ok(taken) => (taken.min(bytes.len()), Ok(taken.min(bytes.len()))),
            Err(error) => (0, Err(error)),
        });
        let taken = result.unwrap_or(Ok(0))?;
        self.since_shrink += taken as u64;
        Ok(taken)
    }

    /// Lends room for what goes to the guest, once; `fill` says how much of it was filled. It is not called
    /// where there is none.
    pub fn lend_room<E>(&mut self, fill: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<usize, E> {
        let Self {
            sockets,
            handle,
            slot,
            check,
            ..
        } = self;
        let result = sockets.get_mut::<Socket<'_>>(*handle).send(|room| {
            let room = slot.allow(room);
            let length = room.len();
            if length == 0 {
                return (0, Ok(0));
            }
            match fill(room) {
                Ok(filled) => {
                    let filled = filled.min(length);
                    if filled == length {
                        slot.note_filled();
                    }
                    if let Some(check) = check {
                        check.show_answer(&room[..filled]);
                    }
                    (filled, Ok(filled))
                }
                Err(error) => (0, Err(error)),
            }
        });
        let filled = result.unwrap_or(Ok(0))?;
        self.since_shrink += filled as u64;
        Ok(filled)
    }

    /// The same of a connection whose name is checked: what may pass, and no more.
    fn lend_checked<E>(&mut self, take: impl FnOnce(&[u8]) -> Result<usize, E>) -> Result<usize, E> {
        self.inspect();
        let allowed = match &self.check {
            Some(check) => check.allowed(),
            // It was the last that had to be seen.
            None => return self.lend_received(take),
        };
        if allowed == 0 {
            return Ok(0);
        }
        let result = self.socket().recv(|bytes| {
            let length = bytes.len().min(allowed);
            match take(&bytes[..length]) {
                Ok(taken) => (taken.min(length), Ok(taken.min(length))),
                Err(error) => (0, Err(error)),
            }
        });
        let taken = result.unwrap_or(Ok(0))?;
        self.since_shrink += taken as u64;
        if let Some(check) = &mut self.check {
            check.note_taken(taken);
        }
        Ok(taken)
    }

    /// Shows the check what has arrived and it has not seen. Afterwards there is none, if everything may pass.
    pub(super) fn inspect(&mut self) {
        let Some(check) = &mut self.check else { return };
        let socket: &mut Socket<'static> = self.sockets.get_mut(self.handle);
        let mut copy = Vec::new();
        loop {
            let (seen, arrived) = (check.ahead(), socket.recv_queue());
            if arrived <= seen {
                break;
            }
            let Ok(first) = socket.peek(arrived) else { break };
            let more = if let Some(rest) = first.get(seen..).filter(|rest| !rest.is_empty()) {
                check.show(rest)
            } else {
                // What was not seen lies behind the ring's end.
                copy.resize(arrived, 0);
                let length = socket.peek_slice(&mut copy).unwrap_or(0);
                check.show(copy.get(seen..length).unwrap_or_default())
            };
            if !more {
                break;
            }
        }
        if check.is_over() {
            self.check = None;
        }
    }

    /// Whether the guest has sent something not yet taken.
    pub fn has_received(&mut self) -> bool {
        self.socket().can_recv()
    }

    /// Whether the guest has finished sending and everything was taken.
    pub fn is_received_whole(&mut self) -> bool {
        matches!(self.socket().peek(0), Err(RecvError::Finished))
    }

    /// Whether there is room for what goes to the guest.
    pub fn has_room(&mut self) -> bool {
        self.socket().can_send()
    }

    /// Nothing more goes to the guest; FIN follows what is queued.
    pub fn close(&mut self) {
        self.socket().close();
    }

    /// Resets the connection: RST leaves with the next [`Self::poll_transmit`].
    pub fn abort(&mut self) {
        self.socket().abort();
    }

    /// Where the connection is in its life.
    pub fn phase(&self) -> Phase {
        match self.state() {
            State::SynSent | State::SynReceived => Phase::Opening,
            // A RST in SYN-RECEIVED puts smoltcp's socket back to Listen: nobody is there any more.
            // TIME-WAIT has no use on a link that neither loses nor reorders.
            State::Listen | State::Closed | State::TimeWait => Phase::Over,
            _ => Phase::Open,
        }
    }

    /// Whether both sides finished in order, rather than by RST.
    pub fn is_finished(&self) -> bool {
        self.state() == State::TimeWait
    }

    /// Whether both sides have closed and only acknowledgements are missing.
    pub fn is_closing(&self) -> bool {
        matches!(
            self.state(),
            State::LastAck | State::Closing | State::FinWait1 | State::FinWait2
        )
    }

    /// Gives ring memory back, if it carried much and holds nothing.
    pub fn shrink_if_idle(&mut self) {
        let socket = self.sockets.get::<Socket<'_>>(self.handle);
        let is_empty = socket.recv_queue() == 0 && socket.send_queue() == 0;
        if self.since_shrink >= SHRINK_AFTER_BYTES && is_empty && !self.has_gaps {
            self.slot.shrink();
            self.since_shrink = 0;
        }
    }

    fn state(&self) -> State {
        self.sockets.get::<Socket<'_>>(self.handle).state()
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.since_shrink >= SHRINK_AFTER_BYTES {
            self.slot.shrink();
        }
    }
}

fn instant(now: Time) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

/// What smoltcp sees as its network: at most one packet in, and the guest's queue out.
struct Port<'a> {
    ether_type: EtherType,
    mtu_bytes: usize,
    packet: Option<&'a [u8]>,
    out: Option<&'a mut Transmit>,
}

impl Port<'_> {
    fn queued(&self) -> usize {
        self.out.as_ref().map_or(0, |out| out.bytes().len())
    }

    fn has_room(&self) -> bool {
        self.out.as_ref().is_some_and(|out| out.has_room(self.mtu_bytes))
    }
}

impl Device for Port<'_> {
    type RxToken<'t>
        = Packet<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Room<'t>
    where
        Self: 't;

    fn receive(&mut self, _: Instant) -> Option<(Packet<'_>, Room<'_>)> {
        let packet = Packet(self.packet.take()?);
        Some((packet, Room(self.ether_type, self.out.as_deref_mut())))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        let room = self.has_room();
        self.out
            .as_deref_mut()
            .filter(|_| room)
            .map(|out| Room(self.ether_type, Some(out)))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu_bytes;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

struct Packet<'a>(&'a [u8]);

impl RxToken for Packet<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one packet.
struct Room<'a>(EtherType, Option<&'a mut Transmit>);

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        match self.1.and_then(|out| out.room(self.0, length)) {
            Some(room) => f(room),
            // Only answers to a packet come here without room (egress checks first); they are lost as
            // on any network, and the guest repeats.
            None => f(&mut vec![0; length]),
        }
    }
}
