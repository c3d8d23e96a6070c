//! Forwards: ports and Unix sockets of the host that lead into guests.
//!
//! Owns the listening sockets. An accepted connection is handed to the guest that has the target's address now, or
//! shows that it has when it is asked; where none has it, the client sees a reset. A UDP forward's socket is handed to
//! the guest whole, and again when the guest comes back; while there is none and datagrams wait, guests are asked. The
//! bytes are the driver's affair, and so is refusing them for a guest under quarantine.
//!
//! Several are opened and closed together or not at all. What is bound stays bound until
//! [`Forwards::unexpose`], [`Forwards::close`] or the end of the last clone; a socket's file goes with it. Nothing
//! else is ever removed from the file system but a socket that nobody serves.

mod accept;
mod bind;
mod error;
mod holder;
mod spec;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::task::AbortHandle;
use vnet_proto::model::{CommandId, ForwardListen, Protocol, VmId};

use crate::admission::Admission;
use crate::descriptors::{Descriptors, Kept};
use crate::forward::accept::{Accepting, StreamListener};
use crate::forward::bind::Bound;
use crate::link::listen::SocketFile;
use crate::message::{Forward, ForwardId, Input, Router};
use crate::metrics::{ForwardRefusal, Metrics};

pub use error::ForwardError;
pub use holder::Holder;
pub use spec::{ForwardSpec, ForwardSpecError};

/// The forwards of one network. Clones share them.
#[derive(Clone)]
pub struct Forwards {
    shared: Arc<Shared>,
}

struct Shared {
    router: Arc<dyn Router>,
    metrics: Arc<Metrics>,
    runtime: tokio::runtime::Handle,
    descriptors: Descriptors,
    /// Of the connections of all forwards.
    admission: Admission,
    limit: usize,
    /// Forwards that are open, or being opened.
    taken: Arc<AtomicUsize>,
    last: AtomicU64,
    looking: holder::Allowance,
    /// Drivers wait for it: held for what is done at once, and for no bind.
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    open: BTreeMap<Key, Open>,
    /// A task is there for the UDP forwards.
    looks_after_datagrams: bool,
}

/// One of the forwards that may be, free again when this is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Protocol (UDP is `true`) and where it listens.
type Key = (bool, ForwardListen);

struct Open {
    id: ForwardId,
    forward: Forward,
    listener: Listener,
    /// Of the two sockets at most; given back after they are closed.
    _descriptors: Kept,
    _place: Place,
}

enum Listener {
    /// The listener is shared with the task that accepts, so that taking it out closes it at once.
    Stream {
        socket: accept::Shared,
        task: Option<AbortHandle>,
        /// Removed after the socket is closed.
        _file: Option<SocketFile>,
    },
    /// Kept to be handed over again.
    Udp {
        socket: UdpSocket,
        /// Who was handed it last, and whether that one has it still.
        holder: Option<(VmId, Weak<()>)>,
    },
}

impl Forwards {
    /// No forwards yet. Accepting runs on `runtime`.
    pub fn new(
        router: Arc<dyn Router>,
        metrics: Arc<Metrics>,
        descriptors: Descriptors,
        runtime: tokio::runtime::Handle,
    ) -> Self {
        Self::with_limit(router, metrics, descriptors, runtime, FORWARDS_MAX)
    }

    fn with_limit(
        router: Arc<dyn Router>,
        metrics: Arc<Metrics>,
        descriptors: Descriptors,
        runtime: tokio::runtime::Handle,
        limit: usize,
    ) -> Self {
        let waiting_max = CONNECTIONS_WAITING_MAX.min(descriptors.reserve() / WAITING_PART);
        Self {
            shared: Arc::new(Shared {
                admission: Admission::new(Arc::clone(&router), Arc::clone(&metrics), waiting_max),
                router,
                metrics,
                runtime,
                descriptors,
                limit,
                taken: Arc::default(),
                last: AtomicU64::new(0),
                looking: holder::Allowance::new(),
                table: Mutex::default(),
            }),
        }
    }

    /// Opens forwards, all or none; the answer is each as it was opened, with the port that the host gave for
    /// port 0.
    ///
    /// # Errors
    /// [`ForwardError`] of the first that cannot be; nothing is changed then.
    pub fn expose(&self, wanted: Vec<Forward>) -> Result<Vec<Forward>, ForwardError> {
        for forward in &wanted {
            check(forward)?;
        }
        let places = self.shared.take_places(wanted.len())?;
        // Everything that can fail comes first. What is bound is closed again when it is dropped.
        let mut made = Vec::with_capacity(wanted.len());
        for (forward, place) in wanted.into_iter().zip(places) {
            match self.shared.make(forward, place) {
                Ok(opened) => made.push(opened),
                Err(error) => {
                    let table = self.shared.lock();
                    let forwards = table.open.values().chain(&made);
                    let named = named_by_forwards(error, forwards.map(|open| &open.forward));
                    drop(table);
                    return Err(named_by_system(named, &self.shared.looking));
                }
            }
        }
        let mut table = self.shared.lock();
        let mut answer = Vec::with_capacity(made.len());
        for mut opened in made {
            self.shared.accept_from(&mut opened);
            let forward = opened.forward.clone();
            if let Some(vm) = self.shared.router.guest_at(forward.target.ip()) {
                self.shared.hand_over(vm, &mut opened);
            }
            let Forward { protocol, target, .. } = forward;
            tracing::info!(%protocol, listen = %forward.listen, %target, "forward opened");
            table.open.insert(key_of(&forward), opened);
            if forward.protocol == Protocol::Udp && !table.looks_after_datagrams {
                table.looks_after_datagrams = true;
                let shared = Arc::downgrade(&self.shared);
                self.shared.runtime.spawn(look_after_datagrams(shared));
            }
            answer.push(forward);
        }
        self.shared.metrics.forwards_open.set(table.open.len() as u64);
        Ok(answer)
    }

    /// Closes forwards, all or none; their ports are free when this returns. The guests that it names cut their
    /// flows, and say so with `command`.
    ///
    /// # Errors
    /// [`ForwardError::NotFound`], [`ForwardError::Protocol`].
    pub fn unexpose(
        &self,
        wanted: &[(Protocol, ForwardListen)],
        command: CommandId,
    ) -> Result<(Vec<Forward>, Vec<VmId>), ForwardError> {
        let mut table = self.shared.lock();
        let mut keys = Vec::with_capacity(wanted.len());
        for (protocol, listen) in wanted {
            let key = (is_udp(*protocol)?, listen.clone());
            if !table.open.contains_key(&key) {
                return Err(ForwardError::NotFound {
                    protocol: *protocol,
                    listen: listen.clone(),
                });
            }
            keys.push(key);
        }
        let closed: Vec<Open> = keys.iter().filter_map(|key| table.open.remove(key)).collect();
        self.shared.metrics.forwards_open.set(table.open.len() as u64);
        drop(table);
        let ids: Arc<[ForwardId]> = closed.iter().map(|open| open.id).collect();
        let forwards: Vec<Forward> = closed.iter().map(|open| open.forward.clone()).collect();
        drop(closed);
        // Not only to the guest at the target now: another may have had its address when a flow began.
        let mut told = self.shared.router.vms();
        told.retain(|vm| {
            let forwards = Arc::clone(&ids);
            self.shared
                .router
                .send(*vm, Input::IngressClosed { command, forwards })
        });
        for Forward { protocol, listen, .. } in &forwards {
            tracing::info!(%protocol, %listen, "forward closed");
        }
        Ok((forwards, told))
    }

    /// Closes all listeners, as the process ends: no socket's file stays behind.
    pub fn close(&self) {
        let mut table = self.shared.lock();
        let open = std::mem::take(&mut table.open);
        self.shared.metrics.forwards_open.set(0);
        drop(table);
        drop(open);
    }

    /// The forwards open now, by protocol and listen address.
    pub fn list(&self) -> Vec<Forward> {
        let table = self.shared.lock();
        table.open.values().map(|open| open.forward.clone()).collect()
    }

    /// A guest has an address now: hands it the sockets of the UDP forwards that lead there, but for those that it
    /// has already. TCP needs nothing; each connection looks the guest up.
    pub fn guest_attached(&self, vm: VmId, address: IpAddr) {
        for open in self.shared.lock().open.values_mut() {
            if open.forward.target.ip() == address {
                self.shared.hand_over(vm, open);
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places for so many more, or for none.
    fn take_places(&self, count: usize) -> Result<Vec<Place>, ForwardError> {
        let limit = self.limit;
        let more = |taken: usize| taken.checked_add(count).filter(|sum| *sum <= limit);
        match self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
        {
            Ok(_) => Ok((0..count).map(|_| Place(Arc::clone(&self.taken))).collect()),
            Err(open) => Err(ForwardError::TooMany { open, limit }),
        }
    }

    /// Binds one. What comes to it waits.
    fn make(&self, forward: Forward, place: Place) -> Result<Open, ForwardError> {
        let descriptors = self
            .descriptors
            .keep_forward()
            .map_err(ForwardError::Descriptors)?;
        let refused = |error| ForwardError::of(forward.protocol, &forward.listen, error);
        let bound = Bound::new(forward.protocol, &forward.listen)?;
        let listen = bound.listens().map_err(refused)?;
        let id = ForwardId(self.last.fetch_add(1, Ordering::Relaxed) + 1);
        let listener = self.listener(bound).map_err(refused)?;
        Ok(Open {
            id,
            forward: Forward { listen, ..forward },
            listener,
            _descriptors: descriptors,
            _place: place,
        })
    }

    /// Asks for the guests of UDP forwards in whose sockets datagrams wait while nobody is known to have the target's
    /// address; false when no UDP forward is open, and the task that looks is over.
    fn seek_for_datagrams(&self) -> bool {
        let mut table = self.lock();
        let (mut is_needed, mut sought) = (false, BTreeSet::new());
        for open in table.open.values() {
            let Listener::Udp { socket, .. } = &open.listener else {
                continue;
            };
            is_needed = true;
            let address = open.forward.target.ip();
            if sought.len() < SOUGHT_MAX && self.router.guest_at(address).is_none() && has_datagram(socket) {
                sought.insert(address);
            }
        }
        table.looks_after_datagrams = is_needed;
        drop(table);
        for address in sought {
            self.router.seek(address);
        }
        is_needed
    }

    fn hand_over(&self, vm: VmId, open: &mut Open) {
        let Listener::Udp { socket, holder } = &mut open.listener else {
            return;
        };
        // A guest may ask for its address as often as it likes, and its driver may be behind.
        let has_it = |(to, held): &(VmId, Weak<()>)| *to == vm && held.strong_count() > 0;
        if holder.as_ref().is_some_and(has_it) {
            return;
        }
        match socket.try_clone() {
            Ok(socket) => {
                let held = Arc::new(());
                *holder = Some((vm, Arc::downgrade(&held)));
                let socket = Input::IngressUdp {
                    forward: open.id,
                    socket,
                    target: open.forward.target,
                    keep_client: open.forward.keep_client,
                    held,
                };
                self.router.send(vm, socket);
            }
            Err(error) => {
                self.metrics
                    .forward_refusals
                    .of(ForwardRefusal::Accept)
                    .increment();
                tracing::warn!(%error, listen = %open.forward.listen, "a forward's socket cannot be handed over");
            }
        }
    }

    fn listener(&self, bound: Bound) -> io::Result<Listener> {
        let _runtime = self.runtime.enter();
        let (socket, file) = match bound {
            Bound::Tcp(socket) => {
                let socket = tokio::net::TcpListener::from_std(socket)?;
                (StreamListener::Tcp(socket), None)
            }
            Bound::Unix(socket, file) => {
                let socket = tokio::net::UnixListener::from_std(socket)?;
                (StreamListener::Unix(socket), Some(file))
            }
            Bound::Udp(socket) => return Ok(Listener::Udp { socket, holder: None }),
        };
        Ok(Listener::Stream {
            socket: Arc::new(Mutex::new(Some(socket))),
            task: None,
            _file: file,
        })
    }

    fn accept_from(&self, open: &mut Open) {
        let Listener::Stream { socket, task, .. } = &mut open.listener else {
            return;
        };
        let accepting = Accepting {
            forward: open.id,
            socket: Arc::clone(socket),
            admission: self.admission.clone(),
            metrics: Arc::clone(&self.metrics),
            target: open.forward.target,
            keep_client: open.forward.keep_client,
        };
        *task = Some(self.runtime.spawn(accepting.run()).abort_handle());
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Stream { socket, task, .. } = self {
            socket.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(task) = task {
                task.abort();
            }
        }
    }
}

/// Once a second: a datagram waits no longer for a guest that has to be asked for its address.
async fn look_after_datagrams(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(DATAGRAMS_EVERY).await;
        let is_needed = shared.upgrade().is_some_and(|shared| shared.seek_for_datagrams());
        if !is_needed {
            return;
        }
    }
}

fn has_datagram(socket: &UdpSocket) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Whether there can be such a forward at all.
fn check(forward: &Forward) -> Result<(), ForwardError> {
    is_udp(forward.protocol)?;
    forward.listen.check(forward.protocol)?;
    let target: SocketAddr = forward.target;
    if target.port() == 0 || target.ip().is_unspecified() || target.ip().is_multicast() {
        return Err(ForwardError::Target(target));
    }
    Ok(())
}

/// What would stand in the way of a forward that listens there, for whoever wants to say so in words of its own before
/// it starts a dataplane. What takes the place later is told by that.
///
/// # Errors
/// Why it could not listen.
pub fn look(protocol: Protocol, listen: &ForwardListen) -> Result<(), ForwardError> {
    let looking = holder::Allowance::new();
    bind::look(protocol, listen).map_err(|error| named_by_system(error, &looking))
}

/// What has a place, as far as the system tells.
pub fn holder_of(protocol: Protocol, listen: &ForwardListen) -> Option<Holder> {
    holder::process(protocol, listen, &holder::Allowance::new())
}

/// Names the forward that is in the way of another, if one is.
fn named_by_forwards<'a>(
    error: ForwardError,
    mut forwards: impl Iterator<Item = &'a Forward>,
) -> ForwardError {
    let ForwardError::InUse {
        protocol,
        listen,
        by: None,
    } = error
    else {
        return error;
    };
    let by = forwards
        .find(|other| other.protocol == protocol && other.listen.overlaps(&listen))
        .map(|other| Holder::Forward {
            listen: other.listen.clone(),
            target: other.target,
        });
    ForwardError::InUse { protocol, listen, by }
}

/// Names the program that is in the way, if nothing is named and the system tells.
fn named_by_system(error: ForwardError, looking: &holder::Allowance) -> ForwardError {
    match error {
        ForwardError::InUse {
            protocol,
            listen,
            by: None,
        } => ForwardError::InUse {
            protocol,
            by: holder::process(protocol, &listen, looking),
            listen,
        },
        other => other,
    }
}

fn key_of(forward: &Forward) -> Key {
    (forward.protocol == Protocol::Udp, forward.listen.clone())
}

fn is_udp(protocol: Protocol) -> Result<bool, ForwardError> {
    match protocol {
        Protocol::Tcp => Ok(false),
        Protocol::Udp => Ok(true),
        Protocol::Icmp | Protocol::Icmpv6 => Err(ForwardError::Protocol(protocol)),
    }
}

/// The forwards of a range: `count` of them, on ports that follow each other.
///
/// # Errors
/// [`ForwardError::Range`].
pub fn range(first: &Forward, count: u32) -> Result<Vec<Forward>, ForwardError> {
    let refused = || ForwardError::Range {
        listen: first.listen.clone(),
        target: first.target,
        count,
        most: FORWARDS_MAX,
    };
    let ports = u16::try_from(count)
        .ok()
        .filter(|ports| *ports > 0 && usize::from(*ports) <= FORWARDS_MAX)
        .ok_or_else(refused)?;
    (0..ports)
        .map(|port| first.further(port))
        .collect::<Option<_>>()
        .ok_or_else(refused)
}

/// How many forwards one network may have.
pub const FORWARDS_MAX: usize = 1024;

/// How many connections of all forwards may wait for their guest's driver.
const CONNECTIONS_WAITING_MAX: usize = 256;
/// They may have this part of the descriptors that are kept back.
const WAITING_PART: usize = 4;
/// How often it is looked whether datagrams wait for a guest that nobody knows.
const DATAGRAMS_EVERY: Duration = Duration::from_secs(1);
/// Addresses that are asked for each time.
const SOUGHT_MAX: usize = 64;
