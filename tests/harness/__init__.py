"""What several test modules share: real servers, real certificates, no mocks."""
