//! Serves those who connect: each becomes a guest of the network, in a thread of its own.
//!
//! The first guest on a socket goes by the socket's name, further ones by NAME-2, NAME-3; a name is
//! free again when its guest is gone. [`Entrance`] hands them out.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::link::Link;
use crate::link::listen::{RecordListener, StreamListener};
use crate::link::packet::{PacketKind, PacketLink};
use crate::link::stream::{StreamKind, StreamLink};
use crate::link::vpnkit::{self, Answers};
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
    taken: Mutex<BTreeSet<usize>>,
    /// When something was last told of it, in milliseconds of the network's clock, and one more.
    said: AtomicU64,
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

impl Entrance {
    /// Of a socket whose first guest is `spec`.
    pub fn new(network: &Arc<Network>, spec: GuestSpec) -> Arc<Self> {
        Arc::new(Self {
            network: Arc::clone(network),
            spec,
            taken: Mutex::default(),
            said: AtomicU64::new(0),
        })
    }

    /// A place for one guest more. `None`, counted and told, when all are taken.
    pub fn admit(self: &Arc<Self>) -> Option<Admission> {
        let mut taken = self.lock();
        let Some(number) = (1..=GUESTS_MAX).find(|n| !taken.contains(n)) else {
            drop(taken);
            self.refuse(
                LinkRefusal::Limit,
                &format_args!("{GUESTS_MAX} guests are on one socket"),
            );
            return None;
        };
        taken.insert(number);
        let mut spec = self.spec.clone();
        if number > 1 {
            spec.name = format!("{}-{number}", spec.name);
            // What pins one guest cannot pin another.
            (spec.pinned_mac, spec.pinned_address) = (None, None);
        }
        let place = Place {
            entrance: Arc::clone(self),
            number,
        };
        Some(Admission { spec, place })
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

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admission {
    /// Lets the guest in.
    pub fn attach(self, link: Link) {
        self.attach_then(link, || {});
    }

    /// As [`Self::attach`]; `then` is called when the guest is gone, or did not get in.
    pub fn attach_then(self, link: Link, then: impl FnOnce() + Send + 'static) {
        let Self { spec, place } = self;
        let entrance = Arc::clone(&place.entrance);
        let leave = Leave(Some(move || {
            then();
            drop(place);
        }));
        if let Err(error) = entrance.network.attach_then(link, spec, move || drop(leave)) {
            entrance.refuse(LinkRefusal::System, &error);
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
        self.entrance.lock().remove(&self.number);
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
