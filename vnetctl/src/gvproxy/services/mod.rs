//! gvproxy's services API: HTTP over streams that others accept, answered by the controlplane. An adapter: what it
//! lists and changes is what `vnetctl` does, for one network.
//!
//! A connection comes in through [`Services::serve_stream`] with its [`Origin`], which says who can be at its other
//! end; `serve` reads its requests, `route` says which of them that origin may make. Each path has its handler:
//! `forwarder` (with `address`, `remote`, `exposed`), `zones`, `inventory`, `stats`, `tunnel`; and the paths of
//! gvproxy's draft of approvals, `network` and `events`. `control` is the controlplane as they see it; `json` and
//! `answer` have the forms of Go's library, which clients know.
//!
//! Paths, methods, status codes, shapes and texts are gvproxy's; `docs/gvproxy.md` has the table, and what differs.

mod address;
mod answer;
mod control;
mod events;
mod exposed;
mod forwarder;
mod guest;
mod inventory;
mod json;
mod network;
mod places;
mod remote;
mod route;
mod serve;
mod stats;
#[cfg(test)]
mod tests;
mod tunnel;
mod zones;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;

pub use self::address::has_ipv6;
pub use self::control::{Question, policy_in_force};
pub use self::exposed::GUEST_FORWARDS_MAX;
pub use self::guest::{
    ALL_GUESTS_CONNECTIONS_MAX, GUEST_CONNECTIONS_MAX, Guest, GuestApi, Token, TokenError,
};
pub use self::tunnel::{NoTunnels, SshTunnels};

use self::answer::Answer;
use self::control::Control;
use self::exposed::Exposed;
use self::guest::Connected;
use self::places::Places;
use self::stats::Traffic;
use super::Tunnels;
use crate::client::Connection;
use crate::launch::Mac;

/// Connections of the services socket at once; beyond them, and so below, the longest idle makes way for the next.
pub const SERVICES_CONNECTIONS_MAX: usize = 256;
/// Connections of all sockets that a VM can reach at once. Whoever takes them all keeps nobody from the services
/// socket.
pub const LISTEN_CONNECTIONS_MAX: usize = 64;
/// Tunnels of the services socket at once; and, apart from those, of sockets that a VM can reach.
pub const TUNNELS_MAX: usize = 256;
/// Streams of events at once.
pub const EVENT_STREAMS_MAX: usize = 32;

/// What the services of a network must know.
pub struct ServicesConfig {
    /// The controlplane.
    pub connection: Connection,
    /// The network's name: whatever is listed or changed is of this one.
    pub network: String,
    /// The gateway's address.
    pub gateway_ip: Ipv4Addr,
    /// The gateway's MAC address.
    pub gateway_mac: Mac,
    /// Addresses that DHCP keeps.
    pub static_leases: BTreeMap<Ipv4Addr, Mac>,
    /// What guests may do; `None`: nothing.
    pub guests: Option<GuestApi>,
    /// Whether a policy or mode is in force for the network's VMs; asked at each request that depends on it.
    pub policy_in_force: Question,
    /// Streams into the network.
    pub tunnels: Arc<dyn Tunnels>,
    /// Unix sockets that lead to guests' over SSH.
    pub ssh: Arc<dyn SshTunnels>,
}

/// Where a connection comes from, and so who may be at its other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A socket that a VM can reach: one that carries `/connect`, and every one over vsock.
    Listen,
    /// A socket of the host's alone.
    Services,
    /// A guest, through the gateway.
    Guest(Guest),
}

impl Origin {
    fn guest(&self) -> Option<&Guest> {
        match self {
            Self::Guest(guest) => Some(guest),
            Self::Listen | Self::Services => None,
        }
    }
}

/// The services of one network.
pub struct Services {
    control: Control,
    gateway_ip: Ipv4Addr,
    gateway_mac: Mac,
    static_leases: BTreeMap<Ipv4Addr, Mac>,
    guests: Option<GuestApi>,
    policy_in_force: Question,
    tunnels: Arc<dyn Tunnels>,
    ssh: Arc<dyn SshTunnels>,
    exposed: Exposed,
    traffic: tokio::sync::Mutex<Traffic>,
    on_services: Limits,
    on_listen: Limits,
    of_guests: Connected,
    event_streams: Arc<Semaphore>,
}

/// What one kind of socket may have at once.
struct Limits {
    connections: Arc<Places>,
    tunnels: Arc<Semaphore>,
}

impl Limits {
    fn new(connections: usize) -> Self {
        Self {
            connections: Places::new(connections),
            tunnels: Arc::new(Semaphore::new(TUNNELS_MAX)),
        }
    }
}

impl Services {
    /// Those of a network. Nothing is asked or opened yet.
    pub fn new(config: ServicesConfig) -> Arc<Self> {
        Arc::new(Self {
            control: Control::new(config.connection, config.network),
            gateway_ip: config.gateway_ip,
            gateway_mac: config.gateway_mac,
            static_leases: config.static_leases,
            guests: config.guests,
            policy_in_force: config.policy_in_force,
            tunnels: config.tunnels,
            ssh: config.ssh,
            exposed: Exposed::default(),
            traffic: tokio::sync::Mutex::default(),
            on_services: Limits::new(SERVICES_CONNECTIONS_MAX),
            on_listen: Limits::new(LISTEN_CONNECTIONS_MAX),
            of_guests: Connected::default(),
            event_streams: Arc::new(Semaphore::new(EVENT_STREAMS_MAX)),
        })
    }

    /// Serves one connection until it ends. `read` is what has been read of it already.
    ///
    /// What a request has begun to change is finished, whether its connection stays or not.
    pub async fn serve_stream<S>(self: &Arc<Self>, stream: S, read: Vec<u8>, origin: Origin)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        serve::stream(self, stream, read, origin).await;
    }

    async fn is_policy_in_force(&self) -> Result<bool, Answer> {
        Ok((self.policy_in_force)().await?)
    }
}
