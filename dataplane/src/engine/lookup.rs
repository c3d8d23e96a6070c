//! The gateway's DNS, joined to the cache and the held misses.

use std::net::SocketAddrV4;
use std::sync::Arc;

use vnet_proto::model::Name;

use crate::engine::cache::Decision;
use crate::engine::{Engine, Time};

impl Engine {
    pub(super) fn handle_dns_datagram(&mut self, _now: Time, _guest: SocketAddrV4, _payload: &[u8]) {}
    pub(super) fn serve_dns(&mut self, _now: Time, _at: usize) {}
    pub(super) fn answer_name(&mut self, _now: Time, _name: &Name, _decision: &Arc<Decision>) {}
    pub(super) fn handle_dns_timeout(&mut self, _now: Time) {}
    pub(super) fn handle_bindings_timeout(&mut self, _now: Time) {}
    /// An upstream answered.
    pub fn handle_resolved(&mut self, _now: Time, _query: u64, _answer: Option<Vec<u8>>) {}
}
