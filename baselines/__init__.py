"""What BiScale and learned policies are held against."""
