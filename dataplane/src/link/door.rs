//! The door of a socket: whether who connects is a guest that comes back, or another.
//!
//! A guest whose hypervisor closed its socket is kept for [`GRACE`], and its connections with it: QEMU's
//! `reconnect-ms`, gvforwarder and others dial again by themselves. The first frame on a new link tells: if it comes
//! from the MAC address of a guest that is away, the link is that guest's, from that frame on. If not, it is another
//! guest's. Where the one that is away was alone on its socket, the other is its successor and has its name, and the
//! one that is away ends first; where there are more guests it has a name of its own, and ends nobody. But while one
//! is away that is under a policy or a mode it waits: it may be that one with another MAC address, and what holds it
//! goes by its name.
//!
//! A guest that only receives sends nothing by itself until it is sent something, and nothing is sent to who is not
//! known. So whoever is silent before the door is asked, once a second, whether it has the address of one that is
//! away (ARP, RFC 826): the answer is its first frame.
//!
//! Over vsock the system says which VM it is that connects. Its guest that is away is then its own, whatever its MAC
//! address, and nobody else's; if that address is another, the one that is away ends, and the other has its name. A
//! further link of a VM whose guest is there is turned away.
//!
//! Nobody waits for who says nothing: those who have yet to speak are watched together by one thread, which is there
//! while there are any. While nobody is away, a guest need not speak to be let in. Of [`UNDECIDED_MAX`] the one there
//! longest that has said nothing makes way for the next, so that whoever dials and is silent keeps out nobody.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use mio::{Events, Poll, Token, Waker};

use crate::engine::Time;
use crate::engine::frame::{Arp, EtherType};
use crate::engine::transmit::Transmit;
use crate::link::listen::Cid;
use crate::link::serve::{Entrance, GUESTS_MAX, Occupant, Room};
use crate::link::{First, Link, LinkError};
use crate::metrics::LinkRefusal;

/// How long a guest whose hypervisor closed its socket is kept.
pub const GRACE: Duration = Duration::from_secs(10);
/// Links at once of which it is not known whose they are, on one socket.
pub const UNDECIDED_MAX: usize = GUESTS_MAX;
/// Links beside them that the thread has yet to look at.
pub const ARRIVALS_MAX: usize = UNDECIDED_MAX;
/// Those of one VM that is known: it does not keep others from coming back.
const UNDECIDED_OF_VM_MAX: usize = 4;
/// A hypervisor may be back before it was noticed that it had gone: for so long a new link is held back, if its
/// guest says nothing, or has the MAC address of one that is there.
const NOTICE: Duration = Duration::from_millis(500);

/// How often who is silent is asked whether it is one that is away.
const ASK_INTERVAL: Duration = Duration::from_secs(1);
/// Addresses that it is asked for at once; those of more guests that are away are told by what they send.
const ASKED_MAX: usize = 64;

const WAKE: Token = Token(usize::MAX);
const EVENTS_A_TURN: usize = 64;

/// Those who have yet to come before the door's thread.
#[derive(Default)]
pub(super) struct Lobby {
    /// The longest there first.
    arrivals: VecDeque<(Link, Option<Cid>)>,
    /// Those who are before it, arrivals included: the VM of each, where it is known.
    undecided: Vec<Option<Cid>>,
    /// Wakes the thread, while there is one.
    waker: Option<Arc<Waker>>,
}

impl Lobby {
    /// Who is away has changed: those before the door may be decided anew.
    pub(super) fn stir(&self) {
        if let Some(waker) = &self.waker {
            // A poller that cannot be woken comes round by itself, at the latest when the next is due.
            let _ = waker.wake();
        }
    }

    /// One is before the door no more.
    fn leave(&mut self, from: Option<Cid>) {
        if let Some(at) = self.undecided.iter().position(|other| *other == from) {
            self.undecided.swap_remove(at);
        }
    }

    /// The arrival that goes, where there are more than there may be, and whether it has said nothing.
    fn take_one_too_many(&mut self) -> Option<(Link, bool)> {
        if self.arrivals.len() <= ARRIVALS_MAX {
            return None;
        }
        let says_nothing =
            |(link, _): &mut (Link, _)| !matches!(link.look(), Ok(first) if first != First::Nobody);
        let silent = self.arrivals.iter_mut().position(says_nothing);
        let (link, from) = self.arrivals.remove(silent.unwrap_or(ARRIVALS_MAX))?;
        self.leave(from);
        Some((link, silent.is_some()))
    }
}

/// Brings a link before the door, of this VM where it is known. At once.
pub(super) fn enter(entrance: &Arc<Entrance>, link: Link, from: Option<Cid>) {
    let mut places = entrance.lock();
    let lobby = &mut places.lobby;
    let is_same = |other: &&Option<Cid>| from.is_some() && **other == from;
    if let Some(cid) = from
        && lobby.undecided.iter().filter(is_same).count() >= UNDECIDED_OF_VM_MAX
    {
        drop(places);
        return entrance.refuse_further(cid);
    }
    if lobby.waker.is_none() {
        // Its thread looks for arrivals when the places are free again.
        match Door::open(entrance) {
            Ok(waker) => lobby.waker = Some(waker),
            Err(error) => {
                drop(places);
                return entrance.refuse(LinkRefusal::System, &error);
            }
        }
    }
    lobby.undecided.push(from);
    lobby.arrivals.push_back((link, from));
    lobby.stir();
    let one_too_many = lobby.take_one_too_many();
    drop(places);
    if let Some((_link, is_silent)) = one_too_many {
        refuse_one_too_many(entrance, is_silent);
    }
}

fn refuse_one_too_many(entrance: &Entrance, is_silent: bool) {
    let why = if is_silent {
        format_args!(
            "{UNDECIDED_MAX} links on one socket had yet to show whose they are; this one had said nothing for the \
             longest time, and made way for another"
        )
    } else {
        format_args!(
            "{UNDECIDED_MAX} links on one socket have spoken, and it is not known yet whose they are"
        )
    };
    entrance.refuse(LinkRefusal::Limit, &why);
}

/// The thread before a socket.
struct Door {
    entrance: Arc<Entrance>,
    poll: Poll,
    /// Who stands before it, in the order in which they came.
    visitors: BTreeMap<usize, Visitor>,
    next: usize,
    /// One that has spoken waits for a place.
    is_one_waiting: bool,
    /// Questions on their way to one of them; empty between.
    questions: Transmit,
}

/// A link of which it is not known whose it is.
struct Visitor {
    link: Link,
    /// The VM, where it is known.
    from: Option<Cid>,
    /// The place that this VM had last.
    wish: Option<usize>,
    readable: bool,
    first: First,
    came: Time,
    /// When it came, or spoke.
    since: Time,
    /// When it was last asked who it is.
    asked: Option<Time>,
    /// The link that its VM has was tried.
    tried: bool,
}

/// What becomes of a visitor.
enum Decision {
    /// It is the guest that is away.
    Back,
    /// It is another.
    Other,
    /// It is a further one of a VM that is there.
    Further(Cid),
    /// Nothing yet; at the latest then.
    Stay(Option<Time>),
}

impl Door {
    fn open(entrance: &Arc<Entrance>) -> io::Result<Arc<Waker>> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let door = Self {
            entrance: Arc::clone(entrance),
            poll,
            visitors: BTreeMap::new(),
            next: 0,
            is_one_waiting: false,
            questions: Transmit::new(entrance.network().gateway().0),
        };
        thread::Builder::new()
            .name("door".to_owned())
            .spawn(move || door.run())?;
        Ok(waker)
    }

    /// While there is anybody.
    fn run(mut self) {
        let mut events = Events::with_capacity(EVENTS_A_TURN);
        while self.take_arrivals() {
            let mut until = self.decide();
            while self.make_way() {
                until = self.decide();
            }
            let wait = if self.visitors.is_empty() {
                Some(Duration::ZERO)
            } else {
                // Round up: before its time nothing is decided.
                until.map(|at| at.saturating_sub(self.entrance.network().now()) + Duration::from_millis(1))
            };
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    self.entrance.refuse(LinkRefusal::System, &error);
                    self.close();
                    return;
                }
                Ok(()) => {}
            }
            for event in &events {
                if let Some(visitor) = self.visitors.get_mut(&event.token().0) {
                    visitor.readable = true;
                }
            }
        }
    }

    /// Sends everybody away.
    fn close(self) {
        let arrivals = {
            let mut places = self.entrance.lock();
            places.lobby.undecided.clear();
            places.lobby.waker = None;
            std::mem::take(&mut places.lobby.arrivals)
        };
        drop(arrivals);
    }

    /// False when nobody is there.
    fn take_arrivals(&mut self) -> bool {
        let arrivals = {
            let mut places = self.entrance.lock();
            let lobby = &mut places.lobby;
            if lobby.arrivals.is_empty() && self.visitors.is_empty() {
                lobby.waker = None;
                return false;
            }
            std::mem::take(&mut lobby.arrivals)
        };
        let now = self.entrance.network().now();
        for (mut link, from) in arrivals {
            let waker = self.entrance.lock().lobby.waker.clone();
            let registered = waker
                .ok_or_else(|| io::ErrorKind::NotConnected.into())
                .and_then(|waker| link.register(self.poll.registry(), Token(self.next), &waker));
            if let Err(error) = registered {
                self.leave(from);
                self.entrance.refuse(LinkRefusal::System, &error);
                continue;
            }
            let visitor = Visitor {
                link,
                from,
                wish: None,
                readable: true,
                first: First::Nobody,
                came: now,
                since: now,
                asked: None,
                tried: false,
            };
            self.visitors.insert(self.next, visitor);
            self.next = (self.next + 1) % WAKE.0;
        }
        true
    }

    /// One is before the door no more.
    fn leave(&self, from: Option<Cid>) {
        self.entrance.lock().lobby.leave(from);
    }

    /// Sends away those of more than there may be: the one there longest that has said nothing, else the latest. True
    /// when one of them proved to have spoken meanwhile, which is to be decided before anybody goes.
    fn make_way(&mut self) -> bool {
        let now = self.entrance.network().now();
        while self.visitors.len() > UNDECIDED_MAX {
            let (mut silent, mut has_spoken) = (None, false);
            for (token, visitor) in &mut self.visitors {
                if visitor.first != First::Nobody {
                    continue;
                }
                // The poller may have yet to tell of it.
                visitor.readable = true;
                if visitor.look(now).is_err() || visitor.first == First::Nobody {
                    silent = Some(*token);
                    break;
                }
                has_spoken = true;
            }
            if has_spoken {
                return true;
            }
            let latest = || self.visitors.last_key_value().map(|(token, _)| *token);
            let Some(visitor) = silent
                .or_else(latest)
                .and_then(|token| self.visitors.remove(&token))
            else {
                break;
            };
            self.leave(visitor.from);
            refuse_one_too_many(&self.entrance, silent.is_some());
        }
        false
    }

    /// Decides what can be; when the next is due.
    fn decide(&mut self) -> Option<Time> {
        let mut until: Option<Time> = None;
        self.is_one_waiting = false;
        for token in self.look() {
            let Some(mut visitor) = self.visitors.remove(&token) else {
                continue;
            };
            if self.entrance.network().is_stopped() {
                self.leave(visitor.from);
                continue;
            }
            let decision = self.judge(&mut visitor);
            if let Decision::Stay(at) = decision {
                until = [until, at].into_iter().flatten().min();
                self.visitors.insert(token, visitor);
                continue;
            }
            self.leave(visitor.from);
            if let Decision::Further(cid) = decision {
                self.entrance.refuse_further(cid);
                continue;
            }
            let Visitor {
                mut link,
                from,
                wish,
                first,
                ..
            } = visitor;
            if let Err(error) = link.deregister(self.poll.registry()) {
                self.entrance.refuse(LinkRefusal::System, &error);
                continue;
            }
            let link = match (decision, first) {
                // Another may have been that guest meanwhile, or its time be over.
                (Decision::Back, First::Station(mac)) => self.entrance.bring_back(mac, from, link),
                _ => Some(link),
            };
            if let Some(link) = link {
                self.entrance.seat(link, from, wish);
            }
        }
        until
    }

    /// Looks what each has said, and sends away those that are over. The order in which the others are decided: those
    /// who have spoken go before those who have not, as there may be one place.
    fn look(&mut self) -> Vec<usize> {
        let tokens: Vec<usize> = self.visitors.keys().copied().collect();
        let (mut spoken, mut silent) = (Vec::new(), Vec::new());
        for token in tokens {
            let Some(mut visitor) = self.visitors.remove(&token) else {
                continue;
            };
            let now = self.entrance.network().now();
            if let Err(error) = visitor.look(now).and_then(|()| self.ask(&mut visitor, now)) {
                self.leave(visitor.from);
                // Whoever only looks whether somebody is there says nothing.
                if !matches!(error, LinkError::Closed) {
                    self.entrance.refuse(LinkRefusal::Unknown, &error);
                }
                continue;
            }
            if visitor.first == First::Nobody {
                silent.push(token);
            } else {
                spoken.push(token);
            }
            self.visitors.insert(token, visitor);
        }
        spoken.append(&mut silent);
        spoken
    }

    fn judge(&mut self, visitor: &mut Visitor) -> Decision {
        let network = self.entrance.network();
        let now = network.now();
        let noticed_at = visitor.since + NOTICE;
        let places = self.entrance.lock();
        if let Some(cid) = visitor.from {
            drop(places);
            return self.judge_known(visitor, cid, now);
        }
        match visitor.first {
            First::Station(mac) if places.is_away(mac) => Decision::Back,
            // A name is about to be free.
            _ if places.is_anybody_leaving() => Decision::Stay(None),
            First::Station(mac) if now < noticed_at && network.has_station(mac) => {
                Decision::Stay(Some(noticed_at))
            }
            First::Nobody if places.is_anybody_away() => Decision::Stay(visitor.ask_again()),
            First::Nobody if now < noticed_at => Decision::Stay(Some(noticed_at)),
            First::Nobody => {
                drop(places);
                self.judge_other(visitor.first)
            }
            First::Station(_) | First::Unknown => {
                drop(places);
                if self.entrance.end_lonely() || self.entrance.is_one_under_policy_away() {
                    Decision::Stay(None)
                } else {
                    self.judge_other(visitor.first)
                }
            }
        }
    }

    /// One that is another, once there is room for it.
    fn judge_other(&mut self, first: First) -> Decision {
        let has_spoken = first != First::Nobody;
        if self.is_one_waiting && !has_spoken {
            return Decision::Stay(None);
        }
        match self.entrance.make_room(has_spoken) {
            Room::Soon => {
                self.is_one_waiting |= has_spoken;
                Decision::Stay(None)
            }
            // Where there is none, it is refused in turn.
            Room::Free | Room::None => Decision::Other,
        }
    }

    /// One of which it is known whose VM it is.
    fn judge_known(&mut self, visitor: &mut Visitor, cid: Cid, now: Time) -> Decision {
        let own = self.entrance.lock().of(cid);
        let Some((number, own)) = own else {
            return self.judge_other(visitor.first);
        };
        visitor.wish = Some(number);
        match (own, visitor.first) {
            (Occupant::Away { mac, .. }, First::Station(own)) if own == mac => Decision::Back,
            (Occupant::Away { .. }, First::Station(_) | First::Unknown) => {
                self.entrance.end_away(cid);
                Decision::Stay(None)
            }
            (Occupant::Away { .. }, First::Nobody) => Decision::Stay(visitor.ask_again()),
            (Occupant::Leaving, _) => Decision::Stay(None),
            (Occupant::Guest, _) => {
                let noticed_at = visitor.came + NOTICE;
                if now >= noticed_at {
                    return Decision::Further(cid);
                }
                // Once: whatever it sends meanwhile is looked at again and again.
                if !std::mem::replace(&mut visitor.tried, true) {
                    self.entrance.try_link(cid);
                }
                Decision::Stay(Some(noticed_at))
            }
        }
    }

    /// Asks a visitor that is silent whether it has the address of a guest that is away.
    fn ask(&mut self, visitor: &mut Visitor, now: Time) -> Result<(), LinkError> {
        if visitor.first != First::Nobody || visitor.asked.is_some_and(|asked| now < asked + ASK_INTERVAL) {
            return Ok(());
        }
        // Also where there is nothing to ask for: its next time is then not over already.
        visitor.asked = Some(now);
        let network = self.entrance.network();
        let away = self.entrance.lock().all_away(visitor.from);
        let addresses = network.addresses_of(&away);
        if addresses.is_empty() {
            return Ok(());
        }
        let (gateway_mac, gateway) = network.gateway();
        let queue = &mut self.questions;
        queue.set_framing(visitor.link.framing());
        for (target, mac) in addresses.into_iter().take(ASKED_MAX) {
            let asks = Arp {
                is_request: true,
                sender_mac: gateway_mac,
                sender: gateway,
                target,
            };
            let write = |out: &mut [u8]| asks.write_request(out);
            let _ = queue.packet_between(gateway_mac, mac, EtherType::Arp, Arp::BYTES, write);
        }
        visitor.link.flush(queue)?;
        // What is left is part of a frame, perhaps, and would be behind no other.
        if queue.is_empty() {
            Ok(())
        } else {
            Err(LinkError::Closed)
        }
    }
}

impl Visitor {
    /// When it is asked again; never, if there is nothing to ask it for.
    fn ask_again(&self) -> Option<Time> {
        self.asked.map(|asked| asked + ASK_INTERVAL)
    }

    fn look(&mut self, now: Time) -> Result<(), LinkError> {
        if self.first == First::Nobody && std::mem::take(&mut self.readable) {
            self.first = self.link.look()?;
            if self.first != First::Nobody {
                self.since = now;
            }
        }
        Ok(())
    }
}
