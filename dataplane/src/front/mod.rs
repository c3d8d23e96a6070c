//! The channel between a dataplane and its *front*: the process that started it, that is not confined, and that
//! speaks to the controlplane (`gvproxy`, `vnetctl up`).
//!
//! It is a pair of datagram sockets. Each datagram is one [`FrontMessage`], a small JSON object, and carries exactly
//! one descriptor: that of the connection which the message is about, and which is the receiver's from then on.
//! Nothing is answered. Both sides use this module, so that neither can say what the other does not read.
//!
//! | from, to | message | the connection is |
//! |---|---|---|
//! | front, dataplane | [`FrontMessage::Tunnel`] | to be piped to an address in the network |
//! | dataplane, front | [`FrontMessage::Services`] | one to `--listen` whose request is none of the dataplane's |
//! | dataplane, front | [`FrontMessage::Guest`] | a guest's to the gateway's port 80 |

mod channel;
mod codec;
#[cfg(test)]
mod tests;
mod tunnels;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

pub use channel::{FrontReceiver, FrontSender, NotSent, open, pair};
pub use codec::MESSAGE_BYTES_MAX;
pub use tunnels::{Asker, Tunnels};

/// What a connection that is handed over is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum FrontMessage {
    /// Front to dataplane: pipe the connection to this place in the network, as a forward would. Where that
    /// cannot be dialled the connection is closed.
    Tunnel {
        /// A guest's address, and a port.
        target: SocketAddr,
    },
    /// Dataplane to front: a connection on `--listen` whose request is neither `/connect` nor `/tunnel`.
    Services {
        /// The URL that it came in by, as `--listen` has it, without its parameters.
        listen: String,
        /// What was read from it already, from its first byte: the request's head at least.
        #[serde(with = "crate::config::base64_text")]
        read: Vec<u8>,
    },
    /// Dataplane to front: a guest's connection to the gateway's port 80.
    Guest {
        /// The guest's handle in the dataplane's session.
        vm: u32,
        /// Its address.
        address: IpAddr,
    },
}
