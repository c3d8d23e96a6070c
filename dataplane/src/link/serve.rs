//! Serves those who connect: each becomes a guest of the network, in a thread of its own.
//!
//! The first guest on a socket goes by the socket's name, further ones by NAME-2, NAME-3; a name is
//! free again when its guest is gone, and not while it is kept since it may come back. [`Entrance`] hands them out.
//! A VM that is known by its number in vsock has one place at a time: it cannot have a further name, and be rid of
//! what goes by its own.
//!
//! Of [`GUESTS_MAX`] guests the one there longest of which no frame has come makes way for one that has spoken, so
//! that whoever connects and says nothing keeps out no VM. A guest that only receives goes by this where there are so
//! many, and nowhere else.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use vnet_proto::model::VmId;

use crate::link::Link;
use crate::link::door::{self, Lobby};
use crate::link::listen::{Cid, RecordListener, StreamListener};
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
/// Of one socket it is told so often at most why somebody was turned away.
const SAY_INTERVAL: Duration = Duration::from_millis(200);

/// Where guests of one socket come in: it names them, and knows how many there are.
pub struct Entrance {
    network: Arc<Network>,
    spec: GuestSpec,
    places: Mutex<Places>,
    /// When something was last told of it, in milliseconds of the network's clock; 0 for never.
    said: AtomicU64,
}

/// The places of a socket, by number, and who stands before its door.
#[derive(Default)]
pub(super) struct Places {
    taken: BTreeMap<usize, Taken>,
    pub(super) lobby: Lobby,
}

/// A place that is taken.
#[derive(Debug, Clone, Copy)]
struct Taken {
    /// The VM, where it is known.
    from: Option<Cid>,
    by: Occupant,
    /// Its guest's handle, once it has one.
    vm: Option<VmId>,
    /// No frame of its guest has come yet.
    is_silent: bool,
}

impl Taken {
    fn new(from: Option<Cid>, by: Occupant) -> Self {
        Self {
            from,
            by,
            vm: None,
            is_silent: true,
        }
    }
}

/// Whether there is a place for one guest more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// Yes.
    Free,
    /// In a moment, or when one of those that say nothing has gone.
    Soon,
    /// No: all have spoken.
    None,
}

/// Who has a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Occupant {
    /// A guest.
    Guest,
    /// A guest that may come back.
    Away { vm: VmId, mac: Mac },
    /// A guest that ends; its name is free in a moment.
    Leaving,
}

impl Places {
    pub(super) fn is_anybody_away(&self) -> bool {
        self.occupants().any(|by| matches!(by, Occupant::Away { .. }))
    }

    pub(super) fn is_anybody_leaving(&self) -> bool {
        self.occupants().any(|by| by == Occupant::Leaving)
    }

    /// Whether a guest with this MAC address is away of which it is not known whose VM it is.
    pub(super) fn is_away(&self, wanted: Mac) -> bool {
        self.away(wanted, None).is_some()
    }

    /// The guests that are away and may be who comes from there.
    pub(super) fn all_away(&self, from: Option<Cid>) -> Vec<VmId> {
        let away = self.taken.values().filter_map(|taken| match taken.by {
            Occupant::Away { vm, .. } if taken.from == from => Some(vm),
            _ => None,
        });
        away.collect()
    }

    /// The place of a VM's guest, if it has one.
    pub(super) fn of(&self, from: Cid) -> Option<(usize, Occupant)> {
        self.taken
            .iter()
            .find(|(_, taken)| taken.from == Some(from))
            .map(|(number, taken)| (*number, taken.by))
    }

    fn away(&self, wanted: Mac, from: Option<Cid>) -> Option<(usize, VmId)> {
        self.taken.iter().find_map(|(number, taken)| match taken.by {
            Occupant::Away { vm, mac } if mac == wanted && taken.from == from => Some((*number, vm)),
            _ => None,
        })
    }

    /// The guest there longest that has said nothing yet, where that is known.
    fn silent(&self) -> Option<(usize, VmId)> {
        let silent = self.taken.iter().filter_map(|(number, taken)| match taken.by {
            Occupant::Guest if taken.is_silent => Some((*number, taken.vm?)),
            _ => None,
        });
        // Handles are given in turn.
        silent.min_by_key(|(_, vm)| vm.0)
    }

    fn occupants(&self) -> impl Iterator<Item = Occupant> {
        self.taken.values().map(|taken| taken.by)
    }

    fn set(&mut self, number: usize, by: Occupant) {
        if let Some(taken) = self.taken.get_mut(&number) {
            taken.by = by;
        }
    }

    /// The lowest that is free, or the one that is wished for.
    fn free(&self, wish: Option<usize>) -> Option<usize> {
        let is_free = |number: &usize| !self.taken.contains_key(number);
        wish.filter(is_free).or_else(|| (1..=GUESTS_MAX).find(is_free))
    }
}

/// A place for one guest, and how it is called.
pub struct Admission {
    /// What is known of it.
    pub spec: GuestSpec,
    place: Place,
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

    /// A place for one guest more. `None`, counted and told, when all are taken; and when guests were told to end.
    pub fn admit(self: &Arc<Self>) -> Option<Admission> {
        if self.network.is_stopped() {
            return None;
        }
        let mut places = self.lock();
        let Some(number) = places.free(None) else {
            drop(places);
            self.refuse_full();
            return None;
        };
        places.taken.insert(number, Taken::new(None, Occupant::Guest));
        Some(Admission {
            spec: self.spec_of(number),
            place: Place {
                entrance: Arc::clone(self),
                number,
            },
        })
    }

    /// Whether one more may come whose link has an end of its own ([`Self::come_in`]); what is known of it if it is
    /// to be the next guest. It keeps no name from others meanwhile, and so gives none a further one. `None` as
    /// [`Self::admit`], but that the place of a guest that is away may be its own, and that one which has said nothing
    /// may make way.
    pub fn foresee(&self) -> Option<GuestSpec> {
        if self.network.is_stopped() {
            return None;
        }
        let places = self.lock();
        let number = places.free(None);
        let may_be_free =
            || places.is_anybody_away() || places.is_anybody_leaving() || places.silent().is_some();
        if number.is_none() && !may_be_free() {
            drop(places);
            self.refuse_full();
            return None;
        }
        Some(self.spec_of(number.unwrap_or(GUESTS_MAX)))
    }

    /// Lets one in over a link, from this VM where it is known: as the guest that is away, if it is that, else as
    /// another. Who it is may show later; this waits for nothing.
    pub fn come_in(self: &Arc<Self>, link: Link, from: Option<Cid>) {
        let is_new = {
            let places = self.lock();
            match from {
                Some(cid) => places.of(cid).is_none() && places.free(None).is_some(),
                None => places.taken.is_empty(),
            }
        };
        if is_new || self.network.grace().is_zero() {
            self.seat(link, from, None);
        } else {
            door::enter(self, link, from);
        }
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

    /// Counts a further link of a VM that has one.
    pub(super) fn refuse_further(&self, Cid(cid): Cid) {
        let why = format_args!("the VM with CID {cid} is on this socket already, and is one guest");
        self.refuse(LinkRefusal::Further, &why);
    }

    /// Lets a guest in, of this VM where it is known: by the name that it wishes for, if that is free, else by the
    /// first free one.
    pub(super) fn seat(self: &Arc<Self>, link: Link, from: Option<Cid>, wish: Option<usize>) {
        let mut places = self.lock();
        if let Some(cid) = from.filter(|cid| places.of(*cid).is_some()) {
            drop(places);
            return self.refuse_further(cid);
        }
        let Some(number) = places.free(wish) else {
            drop(places);
            return self.refuse_full();
        };
        places.taken.insert(number, Taken::new(from, Occupant::Guest));
        drop(places);
        let place = Place {
            entrance: Arc::clone(self),
            number,
        };
        self.let_in(link, self.spec_of(number), place, true, || {});
    }

    /// Whether there is room for one guest more. Where there is none, and that one has spoken, the guest there longest
    /// that has said nothing is told to make way.
    pub(super) fn make_room(&self, has_spoken: bool) -> Room {
        let mut places = self.lock();
        if places.free(None).is_some() {
            return Room::Free;
        }
        if places.is_anybody_leaving() {
            return Room::Soon;
        }
        match places.silent() {
            None => Room::None,
            Some(_) if !has_spoken => Room::Soon,
            Some((number, vm)) => {
                places.set(number, Occupant::Leaving);
                self.network.send(vm, Input::LeaveIfSilent);
                Room::Soon
            }
        }
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
            drop(place);
            then();
        }));
        if let Err(error) = self.network.attach_then(link, spec, berth, move || drop(leave))
            && !self.network.is_stopped()
        {
            self.refuse(LinkRefusal::System, &error);
        }
    }

    /// Hands a link to the guest that is away and has this MAC address, and is of the VM that it comes from where
    /// that is known. The link comes back if there is none (any more).
    pub(super) fn bring_back(&self, mac: Mac, from: Option<Cid>, link: Link) -> Option<Link> {
        let mut places = self.lock();
        let Some((number, vm)) = places.away(mac, from) else {
            return Some(link);
        };
        places.set(number, Occupant::Guest);
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
        let mut guests = places.taken.iter();
        let (number, vm) = match (guests.next(), guests.next()) {
            (Some((number, taken)), None) if taken.from.is_none() => match taken.by {
                Occupant::Away { vm, .. } => (*number, vm),
                _ => return false,
            },
            _ => return false,
        };
        self.end(&mut places, number, vm);
        true
    }

    /// Ends the guest of a VM, if it is away.
    pub(super) fn end_away(&self, from: Cid) {
        let mut places = self.lock();
        if let Some((number, Occupant::Away { vm, .. })) = places.of(from) {
            self.end(&mut places, number, vm);
        }
    }

    fn end(&self, places: &mut Places, number: usize, vm: VmId) {
        places.set(number, Occupant::Leaving);
        self.network.send(vm, Input::Stop);
    }

    /// Has the guest of a VM sent something, so that a link which has no other side any more ends, as of a VM that
    /// was reset.
    pub(super) fn try_link(&self, from: Cid) {
        let places = self.lock();
        let mut own = places.taken.values().filter(|taken| taken.from == Some(from));
        if let Some(vm) = own.find_map(|taken| taken.vm) {
            self.network.send(vm, Input::TryLink);
        }
    }

    /// Whether a guest is away that another name would free of something: it is not open to all others, as are those
    /// that are under neither policy nor mode.
    pub(super) fn is_one_under_policy_away(&self) -> bool {
        let places = self.lock();
        let mut away = places.taken.values().filter_map(|taken| match taken.by {
            // Another VM is known not to be this one.
            Occupant::Away { vm, .. } if taken.from.is_none() => Some(vm),
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
    /// Lets in a guest that cannot come back, over a link that has no end of its own; `then` is called when it is
    /// gone, or did not get in, and its place is free.
    pub fn attach_then(self, link: Link, then: impl FnOnce() + Send + 'static) {
        let Self { spec, place } = self;
        let entrance = Arc::clone(&place.entrance);
        entrance.let_in(link, spec, place, false, then);
    }
}

impl Berth {
    /// The guest's handle is this.
    pub(crate) fn settle(&self, vm: VmId) {
        if let Some(taken) = self.entrance.lock().taken.get_mut(&self.number) {
            taken.vm = Some(vm);
        }
    }

    /// A frame of the guest's has come.
    pub(crate) fn speak(&self) {
        let mut places = self.entrance.lock();
        if let Some(taken) = places.taken.get_mut(&self.number) {
            taken.is_silent = false;
            if taken.by == Occupant::Leaving {
                // It was to make way, and need not; who waits for its place looks for another.
                taken.by = Occupant::Guest;
                places.lobby.stir();
            }
        }
    }

    /// The guest was told to make way if it had said nothing. True, counted and told, where that is so.
    pub(crate) fn leave_if_silent(&self) -> bool {
        let places = self.entrance.lock();
        if !places
            .taken
            .get(&self.number)
            .is_some_and(|taken| taken.is_silent)
        {
            return false;
        }
        drop(places);
        let name = self.name();
        let why = format_args!(
            "{GUESTS_MAX} guests are on one socket; {name} had said nothing for the longest time, and made way for \
             another"
        );
        self.entrance.refuse(LinkRefusal::Limit, &why);
        true
    }

    /// The guest's link is gone; from now on another may come, as an input of its driver.
    pub(crate) fn leave(&self, vm: VmId, mac: Mac) {
        let mut places = self.entrance.lock();
        places.set(self.number, Occupant::Away { vm, mac });
        places.lobby.stir();
        drop(places);
        tracing::info!(vm = %self.name(), "the hypervisor closed the connection; it may come back");
    }

    /// The guest has waited long enough. False when a link is among its driver's inputs already.
    pub(crate) fn give_up(&self) -> bool {
        let mut places = self.entrance.lock();
        let taken = places.taken.get(&self.number);
        if !taken.is_some_and(|taken| matches!(taken.by, Occupant::Away { .. })) {
            return false;
        }
        places.set(self.number, Occupant::Leaving);
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
        self.entrance.lock().set(self.number, Occupant::Leaving);
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
        move || listener.accept_from(),
        |entrance, (socket, from)| {
            if entrance.foresee().is_none() {
                return;
            }
            match StreamLink::new(socket, StreamKind::Qemu, &[]) {
                Ok(link) => entrance.come_in(Link::Stream(link), from),
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
        move || listener.accept_from(),
        move |entrance, (socket, from)| handshakes.begin(entrance, socket, from),
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
            if entrance.foresee().is_none() {
                return;
            }
            match PacketLink::new(socket.into(), PacketKind::Records) {
                Ok(link) => entrance.come_in(Link::Packet(link), None),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::tests::{counter, network};

    #[test]
    fn one_that_speaks_before_it_has_made_way_stays_and_the_next_goes() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _context = runtime.enter();
        let (reports, _receiver) = tokio::sync::mpsc::channel(1);
        let entrance = Entrance::new(&network(reports), GuestSpec::default());
        let berth = |number| Berth {
            entrance: Arc::clone(&entrance),
            number,
        };
        let by = |number: usize| entrance.lock().taken[&number].by;
        // The last place was taken first.
        for number in 1..=GUESTS_MAX {
            let mut taken = Taken::new(None, Occupant::Guest);
            taken.vm = u32::try_from(GUESTS_MAX - number).ok().map(VmId);
            entrance.lock().taken.insert(number, taken);
        }
        let (first, second) = (GUESTS_MAX, GUESTS_MAX - 1);
        assert!(entrance.foresee().is_some());
        assert_eq!(entrance.make_room(false), Room::Soon);
        assert_eq!(
            by(first),
            Occupant::Guest,
            "one that says nothing sends nobody away"
        );
        for _ in 0..2 {
            assert_eq!(entrance.make_room(true), Room::Soon);
        }
        assert_eq!((by(first), by(second)), (Occupant::Leaving, Occupant::Guest));
        let stays = berth(first);
        stays.speak();
        assert!(!stays.leave_if_silent());
        assert_eq!(by(first), Occupant::Guest);
        assert_eq!(counter(&entrance.network, "network_link_limit"), 0);
        assert_eq!(entrance.make_room(true), Room::Soon);
        assert_eq!((by(first), by(second)), (Occupant::Guest, Occupant::Leaving));
        assert!(berth(second).leave_if_silent());
        assert_eq!(counter(&entrance.network, "network_link_limit"), 1);
        entrance.lock().taken.remove(&second);
        assert_eq!(entrance.make_room(true), Room::Free);

        // Where all have spoken nobody goes.
        entrance
            .lock()
            .taken
            .insert(second, Taken::new(None, Occupant::Guest));
        (1..=GUESTS_MAX).for_each(|number| berth(number).speak());
        entrance
            .lock()
            .taken
            .values_mut()
            .for_each(|taken| taken.by = Occupant::Guest);
        assert_eq!(entrance.make_room(true), Room::None);
        assert!(entrance.foresee().is_none());
        assert_eq!(counter(&entrance.network, "network_link_limit"), 2);
    }
}
