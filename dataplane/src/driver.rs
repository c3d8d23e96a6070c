//! The only loop of a guest: clock, link, sockets and channels in; engine calls; bytes out.
//!
//! One thread a guest, which owns everything of it; no lock and no channel on the path of a packet.
//! Each turn: read a batch from the link and hand every frame to the engine, do what is due, service
//! the flows that have something to do, act on the engine's events, write everything out at once.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket as StdUdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use ahash::HashMap;
use mio::net::UdpSocket;
use mio::{Events, Interest, Poll, Token, Waker};
use tokio::sync::mpsc::Sender;
use vnet_proto::model::{Protocol, VmId};

use crate::capture::tap::now_ns;
use crate::capture::{Tap, Taps};
use crate::descriptors::Descriptor;
use crate::egress::sockets::{HostSocket, Sockets};
use crate::engine::frame::{DropReason, ETHERNET_BYTES};
use crate::engine::reply::Unreachable;
use crate::engine::tcp::DialError;
use crate::engine::{Engine, Event, Outcome, Time};
use crate::front::FrontMessage;
use crate::inbox::Inbox;
use crate::link::serve::Berth;
use crate::link::{Filled, Link, LinkError};
use crate::message::{ForwardId, Ingress, Input, Origin, Report, Router as _};
use crate::network::Network;
use crate::outlet::Outlet;

const LINK: Token = Token(usize::MAX - 1);
const WAKE: Token = Token(usize::MAX - 2);
/// Tokens of UDP forwards' sockets, their ids added; flows' places are below.
const FORWARDS: usize = 1 << 40;

const EVENTS_A_TURN: usize = 1024;
/// Reads of the link before everything else has its turn.
const READS_A_TURN: usize = 64;
/// Datagrams taken from one host socket before the others have their turn.
const DATAGRAMS_A_TURN: usize = 64;
/// Frames and packets of other guests taken before everything else has its turn.
const PASSED_A_TURN: usize = 512;
/// Largest datagram, bytes.
const DATAGRAM_BYTES_MAX: usize = 65_536;
/// How long a link is waited for that is on its way already.
const HAND_OVER: Duration = Duration::from_millis(10);
/// Room that must be left towards the guest for the link to be read: answers must fit.
const ROOM_TO_READ: usize = 192 << 10;

/// A guest's loop.
pub(crate) struct Driver {
    vm: VmId,
    poll: Poll,
    waker: Arc<Waker>,
    /// None while the guest's hypervisor is away.
    link: Option<Link>,
    link_readable: bool,
    link_writable: bool,
    link_asked: Time,
    /// Where another link may come from.
    berth: Option<Berth>,
    /// No frame has come yet.
    is_silent: bool,
    /// It is to leave if none is there now.
    leaves_if_silent: bool,
    /// For how long another link is waited for.
    away_until: Time,
    engine: Engine,
    sockets: Sockets,
    forwards: HashMap<ForwardId, ForwardSocket>,
    /// Places of flows from clients of UDP forwards.
    clients: HashMap<(ForwardId, SocketAddr), usize>,
    inputs: Receiver<Input>,
    inbox: Arc<Inbox>,
    outlet: Outlet,
    network: Arc<Network>,
    resolver: Ask,
    dirty: Vec<usize>,
    /// Flows that wait for room towards the guest.
    blocked: Vec<usize>,
    /// Datagram sockets that have more than their turn took.
    unread: Vec<usize>,
    /// What captures this guest.
    taps: Taps,
    scratch: Box<[u8]>,
}

struct ForwardSocket {
    socket: UdpSocket,
    target: SocketAddr,
    keep_client: bool,
    unread: bool,
    _held: Arc<()>,
}

/// Asks an upstream a query; the descriptor is given back when it has an end.
pub(crate) type Ask = Box<dyn Fn(u64, Vec<u8>, Descriptor) + Send>;

/// What a driver is made with.
pub(crate) struct DriverParts {
    /// The guest's handle.
    pub vm: VmId,
    /// Its link.
    pub link: Link,
    /// Where another may come from when it is gone, if it may.
    pub berth: Option<Berth>,
    /// Its engine.
    pub engine: Engine,
    /// From the rest of the dataplane.
    pub inputs: Receiver<Input>,
    /// From other guests.
    pub inbox: Arc<Inbox>,
    /// To the session.
    pub reports: Sender<Report>,
    /// What guests share.
    pub network: Arc<Network>,
    /// Captures this guest from its first frame on.
    pub tap: Option<Tap>,
    /// Asks an upstream; the answer comes as [`Input::Resolved`].
    pub resolver: Ask,
}

impl Driver {
    /// A driver, and what wakes it after an input was sent.
    ///
    /// # Errors
    /// The system's poller.
    pub(crate) fn new(parts: DriverParts) -> io::Result<(Self, Arc<Waker>)> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let mut link = parts.link;
        link.register(poll.registry(), LINK, &waker)?;
        let mut engine = parts.engine;
        engine.transmit.set_framing(link.framing());
        let mut taps = Taps::default();
        if let Some(tap) = parts.tap {
            taps.add(tap, &mut engine.transmit);
        }
        if let Some(berth) = &parts.berth {
            berth.settle(parts.vm);
        }
        let driver = Self {
            vm: parts.vm,
            poll,
            waker: Arc::clone(&waker),
            link: Some(link),
            link_readable: true,
            link_writable: true,
            link_asked: Time::ZERO,
            berth: parts.berth,
            is_silent: true,
            leaves_if_silent: false,
            away_until: Time::ZERO,
            engine,
            sockets: Sockets::default(),
            forwards: HashMap::default(),
            clients: HashMap::default(),
            inputs: parts.inputs,
            inbox: parts.inbox,
            outlet: Outlet::new(parts.reports),
            network: parts.network,
            resolver: parts.resolver,
            dirty: Vec::new(),
            blocked: Vec::new(),
            unread: Vec::new(),
            taps,
            scratch: vec![0; DATAGRAM_BYTES_MAX].into_boxed_slice(),
        };
        Ok((driver, waker))
    }

    /// Runs until the link ends and no other comes in time, or [`Input::Stop`].
    ///
    /// # Errors
    /// Why the link ended, if not by [`Input::Stop`].
    pub(crate) fn run(mut self) -> Result<(), LinkError> {
        let result = self.turn_until_over();
        self.engine.handle_link_down();
        let now = self.network.now();
        self.act_on_events(now);
        // The session must hear that the guest is gone, however full its queue is.
        self.outlet.drain();
        result
    }

    fn turn_until_over(&mut self) -> Result<(), LinkError> {
        let mut events = Events::with_capacity(EVENTS_A_TURN);
        loop {
            let timeout = self.timeout();
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(LinkError::Io(error)),
                Ok(()) => {}
            }
            let now = self.network.now();
            for event in &events {
                self.handle_ready(now, event);
            }
            if self.take_inputs(now)? {
                return Ok(());
            }
            self.wait_for_link(now)?;
            self.take_passed(now);
            self.read_link(now).or_else(|error| self.lose_link(now, error))?;
            if std::mem::take(&mut self.leaves_if_silent)
                && self.berth.as_ref().is_some_and(Berth::leave_if_silent)
            {
                return Ok(());
            }
            self.engine.handle_timeout(now);
            self.read_datagrams(now);
            self.service(now);
            self.act_on_events(now);
            self.tell();
            self.write_link().or_else(|error| self.lose_link(now, error))?;
            self.check_alive(now)?;
        }
    }

    /// The link is over. If the other side closed it, and can come back, and had shown who it is, everything else
    /// goes on without: the guest's flows wait for it.
    fn lose_link(&mut self, now: Time, error: LinkError) -> Result<(), LinkError> {
        let (LinkError::Closed, Some(mac)) = (&error, self.engine.spoken_mac()) else {
            return Err(error);
        };
        if self.berth.is_none() {
            return Err(error);
        }
        // Closed before anybody else can come.
        self.link = None;
        self.link_readable = false;
        self.away_until = now + self.network.grace();
        self.engine.handle_link_lost();
        self.act_on_events(now);
        self.tell();
        if let Some(berth) = &self.berth {
            berth.leave(self.vm, mac);
        }
        Ok(())
    }

    /// The guest's hypervisor is back.
    fn take_link(&mut self, mut link: Link) -> Result<(), LinkError> {
        link.register(self.poll.registry(), LINK, &self.waker)
            .map_err(LinkError::Io)?;
        self.network.metrics().links_back.increment();
        self.engine.handle_link_back(link.framing());
        self.link = Some(link);
        (self.link_readable, self.link_writable) = (true, true);
        Ok(())
    }

    fn wait_for_link(&mut self, now: Time) -> Result<(), LinkError> {
        if self.link.is_some() || now < self.away_until {
            return Ok(());
        }
        if self.berth.as_ref().is_none_or(Berth::give_up) {
            return Err(LinkError::Closed);
        }
        self.away_until = now + HAND_OVER;
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        let room = self.engine.transmit.has_room(ROOM_TO_READ);
        let more = (self.link_readable && self.may_read())
            || !self.dirty.is_empty()
            || self.engine.has_dirty()
            || (room && !(self.unread.is_empty() && self.blocked.is_empty() && self.inbox.is_empty()));
        if more {
            return Some(Duration::ZERO);
        }
        let now = self.network.now();
        let mut until = self.engine.poll_timeout().map(|at| at.saturating_sub(now));
        let mut sooner = |wait: Duration| until = Some(until.map_or(wait, |u| u.min(wait)));
        match &self.link {
            Some(link) => {
                if let Some(retry) = link.retry_after_ms() {
                    sooner(Duration::from_millis(retry));
                }
                if let Some(interval) = link.alive_interval() {
                    sooner(interval);
                }
            }
            None => sooner(self.away_until.saturating_sub(now)),
        }
        // Round up: a wake-up before the deadline would find nothing due.
        until.map(|u| Duration::from_millis(u64::try_from(u.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)))
    }

    fn may_read(&self) -> bool {
        self.engine.transmit.has_room(ROOM_TO_READ) && !self.outlet.is_full()
    }

    fn handle_ready(&mut self, now: Time, event: &mio::event::Event) {
        match event.token() {
            LINK => {
                self.link_readable |= event.is_readable() || event.is_read_closed() || event.is_error();
                self.link_writable |= event.is_writable();
            }
            WAKE => self.link_readable |= self.link.as_ref().is_some_and(Link::has_news),
            Token(token) if token >= FORWARDS => {
                if let Some(forward) = self.forwards.get_mut(&forward_of(token)) {
                    forward.unread = true;
                    self.unread.push(token);
                }
            }
            Token(at) => match self.sockets.get_mut(at) {
                Some(HostSocket::Stream(tcp)) => {
                    tcp.handle_ready(event);
                    if !tcp.dialling {
                        self.dirty.push(at);
                        return;
                    }
                    match tcp.poll_dial() {
                        None => {}
                        Some(Ok(())) => self.engine.handle_dialled(now, at),
                        Some(Err(error)) => self.engine.handle_refused(now, at, dial_error(&error)),
                    }
                }
                Some(HostSocket::Udp(_) | HostSocket::Echo(_)) => self.unread.push(at),
                Some(HostSocket::Client { .. }) | None => {}
            },
        }
    }

    /// Takes everything from the rest of the dataplane. True when it says stop.
    fn take_inputs(&mut self, now: Time) -> Result<bool, LinkError> {
        while let Ok(input) = self.inputs.try_recv() {
            match input {
                Input::Order(order) => self.engine.handle_order(now, order),
                Input::Resolved { query, answer } => self.engine.handle_resolved(now, query, answer),
                Input::Ingress(ingress) => self.take_ingress(now, ingress),
                Input::IngressUdp {
                    forward,
                    socket,
                    target,
                    keep_client,
                    held,
                } => self.take_forward(forward, socket, target, keep_client, held),
                Input::IngressClosed { command, forwards } => {
                    for forward in &*forwards {
                        self.forwards.remove(forward);
                    }
                    let cut = self.engine.close_forwards(now, &forwards);
                    self.engine.report_done(command, cut);
                }
                Input::PermitClosed { flow, end } => self.engine.handle_permit_closed(now, flow, end),
                Input::MakeWay(count) => self.engine.make_way(now, count),
                Input::Turn(turn) => self.outlet.take(turn),
                Input::GuestGone(vm) => self.engine.handle_guest_gone(now, vm),
                Input::Capture(tap) => {
                    if !self.taps.add(tap, &mut self.engine.transmit) {
                        // Who keeps count of captures hands over no more than there may be.
                        tracing::debug!("one capture too many of this guest");
                    }
                }
                Input::Link(link) => self.take_link(*link)?,
                Input::TryLink => self.engine.announce_gateway(),
                Input::Seek(address) => self.engine.seek(address),
                Input::LeaveIfSilent => {
                    self.leaves_if_silent = true;
                    // The poller may have yet to tell of a frame.
                    self.link_readable = true;
                }
                Input::Stop => return Ok(true),
            }
        }
        Ok(false)
    }

    fn take_ingress(&mut self, now: Time, ingress: Ingress) {
        let Ingress {
            stream,
            early,
            target,
            client,
            origin,
            // It has been taken on, or is refused: it waits no longer.
            waiting: _,
        } = ingress;
        let is_tunnel = origin == Origin::Tunnel;
        let Some(at) = self.engine.open_ingress(now, origin.forward(), target, client) else {
            if !is_tunnel {
                // RST rather than FIN: nobody was there.
                stream.set_reset();
            }
            return;
        };
        let registry = self.poll.registry();
        if self
            .sockets
            .accept(registry, at, stream, early, is_tunnel)
            .is_err()
        {
            self.engine.handle_host_reset(now, at);
            return;
        }
        self.dirty.push(at);
    }

    fn take_forward(
        &mut self,
        forward: ForwardId,
        socket: StdUdpSocket,
        target: SocketAddr,
        keep_client: bool,
        held: Arc<()>,
    ) {
        // Its address was another's in between, and it did not come to see it.
        if self.forwards.contains_key(&forward) {
            return;
        }
        let mut socket = UdpSocket::from_std(socket);
        let token = Token(FORWARDS + forward.0 as usize);
        match self
            .poll
            .registry()
            .register(&mut socket, token, Interest::READABLE)
        {
            Ok(()) => {
                let socket = ForwardSocket {
                    socket,
                    target,
                    keep_client,
                    unread: false,
                    _held: held,
                };
                self.forwards.insert(forward, socket);
            }
            Err(error) => tracing::warn!(%target, %error, "udp forward cannot be read"),
        }
    }

    /// Takes what other guests sent, for its turn: a guest that sends without end must not keep this one
    /// from its own work.
    fn take_passed(&mut self, now: Time) {
        self.inbox.look();
        for _ in 0..PASSED_A_TURN {
            if !self.engine.transmit.has_room(ROOM_TO_READ) {
                return;
            }
            let Some(passed) = self.inbox.take() else { return };
            self.engine.handle_passed(now, &passed);
        }
    }

    fn read_link(&mut self, now: Time) -> Result<(), LinkError> {
        let mut reads = 0;
        while self.link_readable && reads < READS_A_TURN && self.may_read() {
            let Some(link) = &mut self.link else { return Ok(()) };
            reads += 1;
            if link.fill()? == Filled::Nothing {
                self.link_readable = false;
                return Ok(());
            }
            for (reason, count) in link.take_drops() {
                if count > 0 {
                    self.engine.count_drops(reason, count);
                }
            }
            if self.taps.are_open() {
                self.handle_frames::<true>(now)?;
            } else {
                self.handle_frames::<false>(now)?;
            }
        }
        Ok(())
    }

    /// Hands what was read to the engine, frame by frame, and to captures where there are any.
    fn handle_frames<const CAPTURED: bool>(&mut self, now: Time) -> Result<(), LinkError> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let at_ns = if CAPTURED { now_ns() } else { 0 };
        while let Some(frame) = link.next_frame()? {
            if self.is_silent && frame.len() >= ETHERNET_BYTES {
                self.is_silent = false;
                if let Some(berth) = &self.berth {
                    berth.speak();
                }
            }
            if CAPTURED {
                let dropped = self.taps.show_sent(at_ns, frame);
                if dropped > 0 {
                    self.engine.capture_dropped += dropped;
                    self.network.metrics().capture_dropped.add(dropped);
                }
            }
            let io = &mut FrameIo {
                poll: &self.poll,
                sockets: &mut self.sockets,
                forwards: &self.forwards,
                network: &self.network,
            };
            let mut outcome = self.engine.handle_frame(now, frame);
            if let Outcome::Switch(to) = outcome {
                outcome = match self.network.switch(self.vm, to, frame) {
                    Ok(()) => Outcome::Done,
                    Err(DropReason::GuestToGuest) => self.engine.handle_unswitched(now, frame),
                    Err(reason) => {
                        self.engine.count_drop(reason);
                        Outcome::Done
                    }
                };
            }
            match outcome {
                Outcome::Done | Outcome::Switch(_) => {}
                Outcome::Datagram { flow, payload } => io.send(now, &mut self.engine, flow, payload),
                Outcome::Echo { flow, message } => io.send(now, &mut self.engine, flow, message),
                Outcome::Datagrams { flow, payloads } => {
                    for payload in &payloads {
                        io.send(now, &mut self.engine, flow, payload);
                    }
                }
                Outcome::Pass { flow, packet } => drop(io.pass(now, &mut self.engine, flow, packet)),
                Outcome::Assembled { flow, payload } => {
                    if !io.pass(now, &mut self.engine, flow, &payload) {
                        io.send(now, &mut self.engine, flow, &payload);
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads datagram sockets that have something, each for its turn.
    fn read_datagrams(&mut self, now: Time) {
        if self.unread.is_empty() {
            return;
        }
        let mut unread = std::mem::take(&mut self.unread);
        unread.sort_unstable();
        unread.dedup();
        for token in unread {
            let more = if token >= FORWARDS {
                self.read_forward(now, forward_of(token))
            } else {
                self.read_socket(now, token)
            };
            if more {
                self.unread.push(token);
            }
        }
    }

    /// True when it has more.
    fn read_socket(&mut self, now: Time, at: usize) -> bool {
        for _ in 0..DATAGRAMS_A_TURN {
            if !self.engine.transmit.has_room(ROOM_TO_READ) {
                return true;
            }
            let (socket, is_echo) = match self.sockets.get_mut(at) {
                Some(HostSocket::Udp(socket)) => (socket, false),
                Some(HostSocket::Echo(socket)) => (socket, true),
                _ => return false,
            };
            match socket.recv(&mut self.scratch) {
                Ok(length) if is_echo => {
                    self.engine
                        .handle_echo_reply(now, at, &mut self.scratch[..length]);
                }
                Ok(length) => self.engine.handle_datagram(now, at, &self.scratch[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => self.engine.handle_send_error(at, send_error(&error)),
            }
        }
        true
    }

    fn read_forward(&mut self, now: Time, id: ForwardId) -> bool {
        let Some(target) = self.forwards.get(&id).map(|forward| forward.target) else {
            return false;
        };
        if self.network.guest_at(target.ip()) != Some(self.vm) {
            // Its address is another guest's now, or nobody's: who has it reads the socket, also what comes from
            // clients that were this guest's.
            if let Some(mut forward) = self.forwards.remove(&id) {
                // Its other copies keep the socket open, and the poller would go on with it.
                let _ = self.poll.registry().deregister(&mut forward.socket);
            }
            self.engine.close_forwards(now, &[id]);
            return false;
        }
        for _ in 0..DATAGRAMS_A_TURN {
            if !self.engine.transmit.has_room(ROOM_TO_READ) {
                return true;
            }
            let Some(forward) = self.forwards.get_mut(&id) else {
                return false;
            };
            match forward.socket.recv_from(&mut self.scratch) {
                Ok((length, client)) => {
                    let shown = forward.keep_client.then_some(client);
                    let at = match self.clients.get(&(id, client)) {
                        Some(at) => *at,
                        None => {
                            let Some(at) = self.engine.open_ingress_udp(now, id, target, shown) else {
                                continue;
                            };
                            self.clients.insert((id, client), at);
                            let client = HostSocket::Client {
                                forward: id,
                                address: client,
                            };
                            self.sockets.put(at, client);
                            at
                        }
                    };
                    self.engine.handle_datagram(now, at, &self.scratch[..length]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    forward.unread = false;
                    return false;
                }
                Err(_) => {}
            }
        }
        true
    }

    /// Moves bytes of every flow that has something to do.
    fn service(&mut self, now: Time) {
        if !self.blocked.is_empty() && self.engine.transmit.has_room(ROOM_TO_READ) {
            self.dirty.append(&mut self.blocked);
        }
        self.engine.take_dirty(&mut self.dirty);
        // A flow may be here for several reasons; it is serviced once.
        self.dirty.sort_unstable();
        self.dirty.dedup();
        let mut again = Vec::new();
        for at in std::mem::take(&mut self.dirty) {
            let room = self.engine.room(at);
            if let Some(HostSocket::Stream(tcp)) = self.sockets.get_mut(at)
                && let Some(connection) = self.engine.connection(at)
            {
                let moved = tcp.transfer(connection, room);
                if moved.up + moved.down != 0 {
                    self.engine.count_bytes(now, at, moved.up, moved.down);
                }
                if moved.failed {
                    self.engine.handle_host_reset(now, at);
                    continue;
                }
                if moved.more {
                    again.push(at);
                }
            }
            if !self.engine.finish_service(now, at) {
                self.blocked.push(at);
            }
        }
        self.dirty = again;
    }

    /// Does what the engine asks of sockets and session.
    fn act_on_events(&mut self, now: Time) {
        while let Some(event) = self.engine.poll_event() {
            match event {
                Event::Report(report) => self.outlet.push(*report),
                Event::Dial { flow, to } => {
                    if let Err(error) = self.sockets.dial(self.poll.registry(), flow, to) {
                        tracing::debug!(%to, %error, "cannot dial");
                        self.engine.handle_refused(now, flow, dial_error(&error));
                    }
                }
                Event::OpenGuestApi { flow, guest } => match self.open_guest_api(flow, guest) {
                    Ok(()) => self.engine.handle_dialled(now, flow),
                    Err(error) => {
                        tracing::debug!(%error, "a guest's connection to the gateway leads nowhere");
                        self.engine.handle_refused(now, flow, DialError::Refused);
                    }
                },
                Event::Send { flow, packets } | Event::Pass { flow, packets } => {
                    let io = &mut FrameIo {
                        poll: &self.poll,
                        sockets: &mut self.sockets,
                        forwards: &self.forwards,
                        network: &self.network,
                    };
                    for packet in packets {
                        if !io.pass(now, &mut self.engine, flow, &packet) {
                            io.send(now, &mut self.engine, flow, &packet);
                        }
                    }
                }
                Event::PermitClosed { to, flow, end } => {
                    // A guest that is gone needs no word.
                    self.network.send(to, Input::PermitClosed { flow, end });
                }
                Event::Close {
                    flow,
                    reset,
                    descriptor,
                } => {
                    if let Some(HostSocket::Client { forward, address }) = self.sockets.get_mut(flow) {
                        self.clients.remove(&(*forward, *address));
                    }
                    self.sockets.close(flow, reset);
                    drop(descriptor);
                }
                Event::Resolve {
                    query,
                    bytes,
                    descriptor,
                } => (self.resolver)(query, bytes, descriptor),
                Event::MakeWay { vm, count } => {
                    // A guest that is gone has made way.
                    self.network.send(vm, Input::MakeWay(count));
                }
            }
        }
    }

    /// Hands a guest's connection to the gateway to the front: one end of a pair, of which the other is the flow's
    /// host socket.
    fn open_guest_api(&mut self, at: usize, guest: IpAddr) -> io::Result<()> {
        let front = self.network.front().ok_or(io::ErrorKind::NotConnected)?;
        let (here, there) = UnixStream::pair()?;
        self.sockets
            .accept(self.poll.registry(), at, here.into(), Vec::new(), false)?;
        let message = FrontMessage::Guest {
            vm: self.vm.0,
            address: guest,
        };
        front.send(&message, there).map_err(io::Error::other)
    }

    fn tell(&mut self) {
        let (network, vm) = (&self.network, self.vm);
        self.outlet.flush(|reports| network.await_turn(vm, reports));
    }

    fn write_link(&mut self) -> Result<(), LinkError> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let retry = link.retry_after_ms().is_some();
        if (self.link_writable || retry) && !self.engine.transmit.is_empty() {
            if self.taps.are_open() {
                let dropped = self.taps.show_queued(now_ns(), &mut self.engine.transmit);
                self.engine.capture_dropped += dropped;
                self.network.metrics().capture_dropped.add(dropped);
            }
            self.link_writable = link.flush(&mut self.engine.transmit)?;
        }
        Ok(())
    }

    fn check_alive(&mut self, now: Time) -> Result<(), LinkError> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if let Some(interval) = link.alive_interval()
            && now >= self.link_asked + interval
        {
            self.link_asked = now;
            if !link.is_alive() {
                return Err(LinkError::Closed);
            }
        }
        Ok(())
    }
}

/// What sending a datagram or a packet needs, apart from the engine and the link that lends it.
struct FrameIo<'a> {
    poll: &'a Poll,
    sockets: &'a mut Sockets,
    forwards: &'a HashMap<ForwardId, ForwardSocket>,
    network: &'a Network,
}

impl FrameIo<'_> {
    /// Hands a packet to the other guest, if the flow is one between two.
    fn pass(&self, now: Time, engine: &mut Engine, at: usize, packet: &[u8]) -> bool {
        let Some((to, passed)) = engine.to_neighbour(at, packet) else {
            return false;
        };
        match self.network.pass(to, passed) {
            Ok(()) => engine.handle_handed_over(now, at, packet),
            Err(reason) => engine.count_drop(reason),
        }
        true
    }

    /// Sends a datagram or echo on a flow's socket, opening it first if need be.
    fn send(&mut self, now: Time, engine: &mut Engine, at: usize, payload: &[u8]) {
        if self.sockets.get_mut(at).is_none()
            && let Some(flow) = engine.flow(at)
        {
            let (to, is_echo) = (flow.dialled, flow.key.protocol != Protocol::Udp);
            let opened = if is_echo {
                self.sockets.open_echo(self.poll.registry(), at, to)
            } else {
                self.sockets.open_udp(self.poll.registry(), at, to)
            };
            if let Err(error) = opened {
                tracing::debug!(%to, %error, "cannot open a socket");
                if is_echo && error.kind() == io::ErrorKind::PermissionDenied {
                    tell_of_echo();
                }
                engine.handle_send_error(at, send_error(&error));
                return;
            }
        }
        let sent = match self.sockets.get_mut(at) {
            Some(HostSocket::Udp(socket) | HostSocket::Echo(socket)) => socket.send(payload),
            Some(HostSocket::Client { forward, address }) => match self.forwards.get(forward) {
                Some(forward) => forward.socket.send_to(payload, *address),
                _ => return,
            },
            Some(HostSocket::Stream(_)) | None => return,
        };
        match sent {
            Ok(_) => engine.count_bytes(now, at, payload.len(), 0),
            // A full socket buffer loses a datagram, as any network may.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => engine.handle_send_error(at, None),
            Err(error) => engine.handle_send_error(at, send_error(&error)),
        }
    }
}

/// The UDP forward that a token is of.
fn forward_of(token: usize) -> ForwardId {
    ForwardId((token - FORWARDS) as u64)
}

fn dial_error(error: &io::Error) -> DialError {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => DialError::Refused,
        io::ErrorKind::HostUnreachable => DialError::HostUnreachable,
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::NetworkDown => DialError::NetworkUnreachable,
        io::ErrorKind::TimedOut => DialError::TimedOut,
        _ => DialError::Local,
    }
}

/// Says, once, why no guest's pings get out.
fn tell_of_echo() {
    static TOLD: std::sync::Once = std::sync::Once::new();
    TOLD.call_once(|| {
        tracing::warn!(
            "guests' pings do not get out: this host lets this user's group send none; let it with: \
             sysctl -w net.ipv4.ping_group_range='0 2147483647'"
        );
    });
}

fn send_error(error: &io::Error) -> Option<Unreachable> {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Some(Unreachable::Port),
        io::ErrorKind::HostUnreachable => Some(Unreachable::Host),
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::NetworkDown => Some(Unreachable::Network),
        _ => None,
    }
}
