//! Forwards: ports of the host that lead into guests.
//!
//! Owns the listening sockets. An accepted TCP connection is handed to the guest that has the target's
//! address now; where none has it, the client sees a reset. A UDP forward's socket is handed to the
//! guest whole, and again when the guest comes back. The bytes are the driver's affair, and so is
//! refusing them for a guest under quarantine.
//!
//! Every call returns at once. What is bound stays bound until [`Forwards::unexpose`] or the end of the
//! last clone.

mod spec;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use vnet_proto::model::{CommandId, Protocol, VmId};

use crate::descriptors::{Descriptors, Kept, NoDescriptor};
use crate::message::{Forward, Ingress, Input, Origin, Router, Waiting};
use crate::metrics::{ForwardRefusal, Metrics};

pub use spec::{ForwardSpec, ForwardSpecError};

/// Why a forward was not opened or closed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Something listens there already: another forward, or another program.
    #[error("{protocol} {listen} is already in use; close what listens there or forward another port")]
    InUse {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: SocketAddr,
    },
    /// The host does not allow it.
    #[error("{protocol} {listen} may not be listened on by this user (ports below 1024 need a privilege)")]
    NotPermitted {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: SocketAddr,
    },
    /// The host has no such address.
    #[error("{listen} is not an address of this host")]
    NoSuchAddress {
        /// Where.
        listen: SocketAddr,
    },
    /// Anything else that the host says.
    #[error("{protocol} {listen} cannot be listened on")]
    Listen {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: SocketAddr,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// Only TCP and UDP have ports.
    #[error("{0} cannot be forwarded (expected tcp or udp)")]
    Protocol(Protocol),
    /// Nothing can be there.
    #[error("{0} is not a place in the network (expected a unicast address and a port other than 0)")]
    Target(SocketAddr),
    /// There is no such forward.
    #[error("nothing is forwarded from {protocol} {listen}")]
    NotFound {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: SocketAddr,
    },
    /// The process may have no more descriptors.
    #[error("no descriptor is left for another forward")]
    Descriptors(#[source] NoDescriptor),
    /// The limit is reached.
    #[error("{limit} forwards are open already; close one first")]
    TooMany {
        /// The limit.
        limit: usize,
    },
}

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
    /// Connections that wait for a guest's driver, of all forwards.
    waiting: Arc<AtomicUsize>,
    limit: usize,
    open: Mutex<BTreeMap<Key, Open>>,
}

/// Protocol (UDP is `true`) and where it listens.
type Key = (bool, SocketAddr);

struct Open {
    forward: Forward,
    listener: Listener,
    /// Of the two sockets at most; given back after they are closed.
    _descriptors: Kept,
}

enum Listener {
    /// The listener is shared with the task that accepts, so that taking it out closes it at once.
    Tcp {
        socket: Arc<Mutex<Option<TcpListener>>>,
        task: AbortHandle,
    },
    /// Kept to be handed over again.
    Udp(UdpSocket),
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
        Self {
            shared: Arc::new(Shared {
                router,
                metrics,
                runtime,
                descriptors,
                waiting: Arc::default(),
                limit,
                open: Mutex::default(),
            }),
        }
    }

    /// Opens a forward; the answer is where it listens, with the port that the host gave for port 0.
    ///
    /// # Errors
    /// [`ForwardError`]; nothing is changed then.
    pub fn expose(&self, forward: Forward) -> Result<SocketAddr, ForwardError> {
        let Forward {
            protocol,
            listen,
            target,
        } = forward;
        let udp = is_udp(protocol)?;
        if target.port() == 0 || target.ip().is_unspecified() || target.ip().is_multicast() {
            return Err(ForwardError::Target(target));
        }
        let mut open = self.shared.lock();
        if open.len() >= self.shared.limit {
            return Err(ForwardError::TooMany {
                limit: self.shared.limit,
            });
        }
        let descriptors = self
            .shared
            .descriptors
            .keep_forward()
            .map_err(ForwardError::Descriptors)?;
        let refused = |error: io::Error| listen_error(protocol, listen, error);
        let (bound, listener) = if udp {
            let socket = UdpSocket::bind(listen).map_err(refused)?;
            socket.set_nonblocking(true).map_err(refused)?;
            (socket.local_addr().map_err(refused)?, Listener::Udp(socket))
        } else {
            let socket = std::net::TcpListener::bind(listen).map_err(refused)?;
            socket.set_nonblocking(true).map_err(refused)?;
            let bound = socket.local_addr().map_err(refused)?;
            (bound, self.shared.accept_from(socket, target).map_err(refused)?)
        };
        let forward = Forward {
            protocol,
            listen: bound,
            target,
        };
        if let Some(vm) = self.shared.router.guest_at(target.ip()) {
            self.shared.hand_over(vm, &forward, &listener);
        }
        let opened = Open {
            forward,
            listener,
            _descriptors: descriptors,
        };
        open.insert((udp, bound), opened);
        self.shared.metrics.forwards_open.set(open.len() as u64);
        tracing::info!(%protocol, listen = %bound, %target, "forward opened");
        Ok(bound)
    }

    /// Closes a forward; its port is free when this returns. The guests that it names cut its flows, and say so
    /// with `command`.
    ///
    /// # Errors
    /// [`ForwardError::NotFound`], [`ForwardError::Protocol`].
    pub fn unexpose(
        &self,
        protocol: Protocol,
        listen: SocketAddr,
        command: CommandId,
    ) -> Result<(Forward, Vec<VmId>), ForwardError> {
        let udp = is_udp(protocol)?;
        let mut open = self.shared.lock();
        let closed = open
            .remove(&(udp, listen))
            .ok_or(ForwardError::NotFound { protocol, listen })?;
        self.shared.metrics.forwards_open.set(open.len() as u64);
        drop(open);
        let forward = closed.forward;
        drop(closed);
        // Not only to the guest at the target now: another may have had its address when a flow began.
        let mut told = self.shared.router.vms();
        told.retain(|vm| {
            let closed = Input::IngressClosed { command, udp, listen };
            self.shared.router.send(*vm, closed)
        });
        tracing::info!(%protocol, %listen, "forward closed");
        Ok((forward, told))
    }

    /// The forwards open now, by protocol and listen address.
    pub fn list(&self) -> Vec<Forward> {
        self.shared.lock().values().map(|open| open.forward).collect()
    }

    /// A guest has an address now: hands it the sockets of the UDP forwards that lead there. TCP needs
    /// nothing; each connection looks the guest up.
    pub fn guest_attached(&self, vm: VmId, address: IpAddr) {
        for open in self.shared.lock().values() {
            if open.forward.target.ip() == address {
                self.shared.hand_over(vm, &open.forward, &open.listener);
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_over(&self, vm: VmId, forward: &Forward, listener: &Listener) {
        let Listener::Udp(socket) = listener else { return };
        match socket.try_clone() {
            Ok(socket) => {
                let Forward { listen, target, .. } = *forward;
                self.router.send(
                    vm,
                    Input::IngressUdp {
                        listen,
                        socket,
                        target,
                    },
                );
            }
            Err(error) => {
                self.metrics
                    .forward_refusals
                    .of(ForwardRefusal::Accept)
                    .increment();
                tracing::warn!(%error, listen = %forward.listen, "a forward's socket cannot be handed over");
            }
        }
    }

    fn accept_from(&self, socket: std::net::TcpListener, target: SocketAddr) -> io::Result<Listener> {
        let _runtime = self.runtime.enter();
        let socket = Arc::new(Mutex::new(Some(TcpListener::from_std(socket)?)));
        let accepting = Accepting {
            socket: Arc::clone(&socket),
            router: Arc::clone(&self.router),
            metrics: Arc::clone(&self.metrics),
            waiting: Arc::clone(&self.waiting),
            waiting_max: CONNECTIONS_WAITING_MAX.min(self.descriptors.reserve() / WAITING_PART),
            target,
        };
        let task = self.runtime.spawn(accepting.run()).abort_handle();
        Ok(Listener::Tcp { socket, task })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Tcp { socket, task } = self {
            socket.lock().unwrap_or_else(PoisonError::into_inner).take();
            task.abort();
        }
    }
}

struct Accepting {
    socket: Arc<Mutex<Option<TcpListener>>>,
    router: Arc<dyn Router>,
    metrics: Arc<Metrics>,
    waiting: Arc<AtomicUsize>,
    waiting_max: usize,
    target: SocketAddr,
}

impl Accepting {
    async fn run(self) {
        while let Some(accepted) = self.accept().await {
            match accepted.and_then(tokio::net::TcpStream::into_std) {
                Ok(stream) => self.admit(stream),
                Err(error) if is_about_one_connection(&error) => {}
                Err(error) => {
                    self.metrics
                        .forward_refusals
                        .of(ForwardRefusal::Accept)
                        .increment();
                    tracing::debug!(%error, target = %self.target, "a forward cannot accept");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    /// The next connection; `None` once the forward is closed.
    async fn accept(&self) -> Option<io::Result<tokio::net::TcpStream>> {
        std::future::poll_fn(
            |context| match &*self.socket.lock().unwrap_or_else(PoisonError::into_inner) {
                None => std::task::Poll::Ready(None),
                Some(listener) => listener
                    .poll_accept(context)
                    .map(|a| Some(a.map(|(stream, _)| stream))),
            },
        )
        .await
    }

    fn admit(&self, stream: TcpStream) {
        let Some(vm) = self.router.guest_at(self.target.ip()) else {
            return self.refuse(&stream, ForwardRefusal::NoGuest);
        };
        let Some(waiting) = Waiting::enter(&self.waiting, self.waiting_max) else {
            return self.refuse(&stream, ForwardRefusal::Backlog);
        };
        let ingress = Ingress {
            stream: stream.into(),
            early: Vec::new(),
            target: self.target,
            origin: Origin::Forward,
            waiting,
        };
        if self.router.send(vm, Input::Ingress(ingress)) {
            self.metrics.forward_connections.increment();
        } else {
            self.metrics
                .forward_refusals
                .of(ForwardRefusal::NoGuest)
                .increment();
        }
    }

    fn refuse(&self, stream: &TcpStream, why: ForwardRefusal) {
        self.metrics.forward_refusals.of(why).increment();
        // A zero linger makes the close a reset. If it cannot be set, the client sees an empty answer.
        let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
    }
}

fn is_udp(protocol: Protocol) -> Result<bool, ForwardError> {
    match protocol {
        Protocol::Tcp => Ok(false),
        Protocol::Udp => Ok(true),
        Protocol::Icmp | Protocol::Icmpv6 => Err(ForwardError::Protocol(protocol)),
    }
}

fn listen_error(protocol: Protocol, listen: SocketAddr, error: io::Error) -> ForwardError {
    match error.kind() {
        io::ErrorKind::AddrInUse => ForwardError::InUse { protocol, listen },
        io::ErrorKind::PermissionDenied => ForwardError::NotPermitted { protocol, listen },
        io::ErrorKind::AddrNotAvailable => ForwardError::NoSuchAddress { listen },
        _ => ForwardError::Listen {
            protocol,
            listen,
            source: error,
        },
    }
}

/// Errors of accept(2) that are about the connection and say nothing of the next.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// How many forwards one network may have.
pub const FORWARDS_MAX: usize = 1024;

/// How many connections of all forwards may wait for their guest's driver.
const CONNECTIONS_WAITING_MAX: usize = 256;
/// They may have this part of the descriptors that are kept back.
const WAITING_PART: usize = 4;

/// How long accepting pauses when the host has no descriptor left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
