//! Serves those who connect: each becomes a guest of the network, in a thread of its own.
//!
//! The first guest on a socket goes by the socket's name, further ones by NAME-2, NAME-3; a name is
//! free again when its guest is gone, and not while it is kept since it may come back. [`Entrance`] hands them out.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use vnet_proto::model::VmId;

use crate::link::Link;
use crate::link::door::{self, Lobby};
use crate::link::listen::{RecordListener, StreamListener};
use crate::link::packet::{PacketKind, PacketLink};
use crate::link::stream::{StreamKind, StreamLink};
use crate::link::vpnkit::{self, Answers};
use crate::mac::Mac;
use crate::message::{Input, Router as _};
use crate::metrics::LinkRefusal;
use crate::network::{GuestSpec, Network};

/// How long a listener rests after an error of the system, as too many descriptors.
const REST: Duration = Duration::from_millis(100);
/// Guests on one socket at once.
pub const GUESTS_MAX: usize = 256;
/// What guests of one socket are refused for is told so often at most.
const SAY_INTERVAL: Duration = Duration::from_millis(200);

/// Where guests of one socket come in: it names them, and knows how many there are.
pub struct Entrance {
    network: Arc<Network>,
    spec: GuestSpec,
    places: Mutex<Places>,
    /// When something was last told of it, in milliseconds of the network's clock, and one more.
    said: AtomicU64,
}

/// The places of a socket, by number, and who stands before its door.
#[derive(Default)]
pub(super) struct Places {
    taken: BTreeMap<usize, Occupant>,
    pub(super) lobby: Lobby,
}

/// Who has a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Occupant {
    /// Somebody who is on the way in.
    Arriving,
    /// A guest.
    Guest,
    /// A guest that may come back.
    Away { vm: VmId, mac: Mac },
    /// A guest that ends; its name is free in a moment.
    Leaving,
}

impl Places {
    pub(super) fn is_anybody_away(&self) -> bool {
        self.taken.values().any(|o| matches!(o, Occupant::Away { .. }))
    }

    pub(super) fn is_anybody_leaving(&self) -> bool {
        self.taken.values().any(|o| *o == Occupant::Leaving)
    }

    /// Whether a guest with this MAC address is away.
    pub(super) fn is_away(&self, wanted: Mac) -> bool {
        self.away(wanted).is_some()
    }

    fn away(&self, wanted: Mac) -> Option<(usize, VmId)> {
        self.taken.iter().find_map(|(number, occupant)| match occupant {
            Occupant::Away { vm, mac } if *mac == wanted => Some((*number, *vm)),
            _ => None,
        })
    }

    fn free(&self) -> Option<usize> {
        (1..=GUESTS_MAX).find(|n| !self.taken.contains_key(n))
    }
}

/// A place for one guest, and how it is called.
pub struct Admission {
    /// What is known of it.
    pub spec: GuestSpec,
    entrance: Arc<Entrance>,
    /// None where all are taken, but not all of their guests are there.
    place: Option<Place>,
}

/// Free again when this is dropped.
struct Place {
    entrance: Arc<Entrance>,
    number: usize,
}

/// Where a guest's driver says that its link is gone, and waits for another. Dropped with the driver.
pub struct Berth {
    entrance: Arc<Entrance>,
    number: usize,
}

impl Entrance {
    /// Of a socket whose first guest is `spec`.
    pub fn new(network: &Arc<Network>, spec: GuestSpec) -> Arc<Self> {
        Arc::new(Self {
            network: Arc::clone(network),
            spec,
            places: Mutex::default(),
            said: AtomicU64::new(0),
        })
    }

    /// A place for one guest more. `None`, counted and told, when all are taken by guests that are there, and when
    /// guests were told to end.
    pub fn admit(self: &Arc<Self>) -> Option<Admission> {
        if self.network.is_stopped() {
            return None;
        }
        let mut places = self.lock();
        let number = places.free();
        if number.is_none() && !places.is_anybody_away() {
            drop(places);
            self.refuse_full();
            return None;
        }
        let place = number.map(|number| {
            places.taken.insert(number, Occupant::Arriving);
            Place {
                entrance: Arc::clone(self),
                number,
            }
        });
        Some(Admission {
            spec: self.spec_of(number.unwrap_or(GUESTS_MAX)),
            entrance: Arc::clone(self),
            place,
        })
    }

    fn spec_of(&self, number: usize) -> GuestSpec {
        let mut spec = self.spec.clone();
        if number > 1 {
            spec.name = format!("{}-{number}", spec.name);
            // What pins one guest cannot pin another.
            (spec.pinned_mac, spec.pinned_address) = (None, None);
        }
        spec
    }

    fn refuse_full(&self) {
        self.refuse(
            LinkRefusal::Limit,
            &format_args!("{GUESTS_MAX} guests are on one socket"),
        );
    }

    /// Lets a guest in by the first free name.
    pub(super) fn seat(self: &Arc<Self>, link: Link) {
        let mut places = self.lock();
        let Some(number) = places.free() else {
            drop(places);
            return self.refuse_full();
        };
        places.taken.insert(number, Occupant::Guest);
        drop(places);
        let place = Place {
            entrance: Arc::clone(self),
            number,
        };
        self.let_in(link, self.spec_of(number), place, true, || {});
    }

    fn let_in(
        self: &Arc<Self>,
        link: Link,
        spec: GuestSpec,
        place: Place,
        may_return: bool,
        then: impl FnOnce() + Send + 'static,
    ) {
        let berth = (may_return && !self.network.grace().is_zero()).then(|| Berth {
            entrance: Arc::clone(self),
            number: place.number,
        });
        let leave = Leave(Some(move || {
            then();
            drop(place);
        }));
        if let Err(error) = self.network.attach_then(link, spec, berth, move || drop(leave))
            && !self.network.is_stopped()
        {
            self.refuse(LinkRefusal::System, &error);
        }
    }

    /// Hands a link to the guest that is away and has this MAC address. The link comes back if there is none (any
    /// more).
    pub(super) fn bring_back(&self, mac: Mac, link: Link) -> Option<Link> {
        let mut places = self.lock();
        let Some((number, vm)) = places.away(mac) else {
            return Some(link);
        };
        places.taken.insert(number, Occupant::Guest);
        // While its driver cannot look: whoever finds that it is not away any more has the link already. One that
        // has ended just now needs none; its hypervisor dials again.
        if self.network.send(vm, Input::Link(Box::new(link))) {
            tracing::info!(vm = %self.spec_of(number).name, "the guest is back");
        }
        // Those who waited for it, and were looked at before it.
        places.lobby.stir();
        None
    }

    /// Ends the guest that is away if it is alone on its socket. True if there is such a one.
    pub(super) fn end_lonely(&self) -> bool {
        let mut places = self.lock();
        let mut guests = places
            .taken
            .iter()
            .filter(|(_, occupant)| **occupant != Occupant::Arriving);
        let (number, vm) = match (guests.next(), guests.next()) {
            (Some((number, Occupant::Away { vm, .. })), None) => (*number, *vm),
            _ => return false,
        };
        places.taken.insert(number, Occupant::Leaving);
        self.network.send(vm, Input::Stop);
        true
    }

    /// Whether a guest is away that another name would free of something: it is not open to all others, as are those
    /// that are under neither policy nor mode.
    pub(super) fn is_one_under_policy_away(&self) -> bool {
        let places = self.lock();
        let mut away = places.taken.values().filter_map(|occupant| match occupant {
            Occupant::Away { vm, .. } => Some(*vm),
            _ => None,
        });
        away.any(|vm| !self.network.is_switch_open(vm))
    }

    pub(super) fn network(&self) -> &Network {
        &self.network
    }

    /// Counts one who was not let in, and tells of it unless something was told just now: whoever connects
    /// without end does not make the log grow without end.
    pub fn refuse(&self, cause: LinkRefusal, why: &dyn std::fmt::Display) {
        self.network.metrics().link_refusals.of(cause).increment();
        let now = u64::try_from(self.network.now().as_millis()).unwrap_or(u64::MAX);
        let before = self.said.load(Ordering::Relaxed);
        let interval = u64::try_from(SAY_INTERVAL.as_millis()).unwrap_or(u64::MAX);
        if before == 0 || now >= before.saturating_add(interval) {
            self.said.store(now.max(1), Ordering::Relaxed);
            tracing::warn!(vm = %self.spec.name, reason = %why, "a guest was turned away");
        }
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admission {
    /// Lets the guest in: as the one that is away, if it is that, else as another. Who it is may show later; this
    /// waits for nothing.
    pub fn attach(self, link: Link) {
        let Self { entrance, place, .. } = self;
        let is_first = entrance
            .lock()
            .taken
            .values()
            .all(|occupant| *occupant == Occupant::Arriving);
        // Whoever has yet to be let in keeps no name from others.
        drop(place);
        if is_first || entrance.network.grace().is_zero() {
            entrance.seat(link);
        } else {
            door::enter(&entrance, link);
        }
    }

    /// Lets in a guest that cannot come back, over a link that has no end of its own; `then` is called when it is
    /// gone, or did not get in.
    pub fn attach_then(self, link: Link, then: impl FnOnce() + Send + 'static) {
        let Self {
            spec,
            entrance,
            place,
        } = self;
        let Some(place) = place else {
            entrance.refuse_full();
            return then();
        };
        entrance.let_in(link, spec, place, false, then);
    }
}

impl Berth {
    /// The guest's link is gone; from now on another may come, as an input of its driver.
    pub(crate) fn leave(&self, vm: VmId, mac: Mac) {
        let mut places = self.entrance.lock();
        places.taken.insert(self.number, Occupant::Away { vm, mac });
        places.lobby.stir();
        drop(places);
        tracing::info!(vm = %self.name(), "the hypervisor closed the connection; it may come back");
    }

    /// The guest has waited long enough. False when a link is among its driver's inputs already.
    pub(crate) fn give_up(&self) -> bool {
        let mut places = self.entrance.lock();
        match places.taken.get_mut(&self.number) {
            Some(occupant @ Occupant::Away { .. }) => *occupant = Occupant::Leaving,
            _ => return false,
        }
        drop(places);
        self.entrance.network.metrics().links_given_up.increment();
        true
    }

    fn name(&self) -> String {
        self.entrance.spec_of(self.number).name
    }
}

impl Drop for Berth {
    fn drop(&mut self) {
        if let Some(occupant) = self.entrance.lock().taken.get_mut(&self.number) {
            *occupant = Occupant::Leaving;
        }
    }
}

/// Calls something when it is dropped.
struct Leave<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for Leave<F> {
    fn drop(&mut self) {
        if let Some(then) = self.0.take() {
            then();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.entrance.lock();
        places.taken.remove(&self.number);
        places.lobby.stir();
    }
}

/// Serves QEMU's `-netdev stream`.
///
/// # Errors
/// When the system has no thread left.
pub fn streams(network: &Arc<Network>, listener: StreamListener, spec: GuestSpec) -> io::Result<()> {
    accept_loop(
        Entrance::new(network, spec),
        move || listener.accept(),
        |entrance, socket| {
            let Some(admission) = entrance.admit() else { return };
            match StreamLink::new(socket, StreamKind::Qemu, &[]) {
                Ok(link) => admission.attach(Link::Stream(link)),
                Err(error) => entrance.refuse(LinkRefusal::System, &error),
            }
        },
    )
}

/// Serves HyperKit. Handshakes run beside each other and beside the accepting, each in its own thread.
///
/// # Errors
/// When the system has no thread left.
pub fn vpnkit(
    network: &Arc<Network>,
    listener: StreamListener,
    spec: GuestSpec,
    answers: Answers,
) -> io::Result<()> {
    let handshakes = vpnkit::Handshakes::new(answers);
    accept_loop(
        Entrance::new(network, spec),
        move || listener.accept(),
        move |entrance, socket| handshakes.begin(entrance, socket),
    )
}

/// Serves those who send a frame a record: BESS, User Mode Linux.
///
/// # Errors
/// When the system has no thread left.
pub fn records(network: &Arc<Network>, listener: RecordListener, spec: GuestSpec) -> io::Result<()> {
    accept_loop(
        Entrance::new(network, spec),
        move || listener.accept(),
        |entrance, socket| {
            let Some(admission) = entrance.admit() else { return };
            match PacketLink::new(socket.into(), PacketKind::Records) {
                Ok(link) => admission.attach(Link::Packet(link)),
                Err(error) => entrance.refuse(LinkRefusal::System, &error),
            }
        },
    )
}

fn accept_loop<S>(
    entrance: Arc<Entrance>,
    accept: impl Fn() -> io::Result<S> + Send + 'static,
    serve: impl Fn(&Arc<Entrance>, S) + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new().name("accept".to_owned()).spawn(move || {
        loop {
            match accept() {
                Ok(socket) => serve(&entrance, socket),
                Err(error) => {
                    entrance.refuse(LinkRefusal::System, &error);
                    thread::sleep(REST);
                }
            }
        }
    })?;
    Ok(())
}
