//! stub
#[derive(Clone, Default)]
pub struct Zones;
