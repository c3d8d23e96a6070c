//! stub
use std::net::Ipv4Addr; use crate::mac::Mac; use crate::engine::Time; use vnet_proto::model::VmId;
pub struct Leases;
impl Leases { pub fn claim(&mut self, _v: VmId, _m: Mac, _a: Ipv4Addr, _n: Time) -> bool { true } pub fn owner(&self, _a: Ipv4Addr) -> Option<VmId> { None } pub fn release_vm(&mut self, _v: VmId) {} pub fn pin(&mut self, _v: VmId, _m: Option<Mac>, _a: Ipv4Addr) {} }
