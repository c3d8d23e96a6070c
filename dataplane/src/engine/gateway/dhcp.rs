//! stub
use std::net::Ipv4Addr; use crate::mac::Mac; use crate::engine::Time; use crate::leases::Leases; use vnet_proto::model::VmId;
#[derive(Debug, Clone)] pub struct DhcpConfig;
pub struct DhcpReply { pub payload: Vec<u8>, pub to: Ipv4Addr, pub to_mac: Mac }
#[derive(Default)] pub struct DhcpOutcome { pub reply: Option<DhcpReply>, pub bound: Option<Ipv4Addr>, pub released: Option<Ipv4Addr>, pub claimed_hostname: Option<String> }
pub fn handle(_l: &mut Leases, _c: &DhcpConfig, _vm: VmId, _m: Mac, _p: &[u8], _n: Time) -> DhcpOutcome { DhcpOutcome::default() }
